#!/bin/sh
# Converts the fixtures: tests/fixtures/NAME/ -> NAME.kvz in f32, and smol in the other types as well.
# The same bytes come out each time, on any machine; tests/test_export.py checks that.
#   PYTHON=.venv/bin/python tests/convert_fixtures.sh [OUT_DIR]
cd "$(dirname "$0")/.." || exit 1
out=${1:-tests/fixtures}
convert() { # NAME TYPE OUT
    "${PYTHON:-python3}" export.py "tests/fixtures/$1" --type "$2" -o "$out/$3.kvz" || exit 1
}
for name in smol llama qwen2 qwen3 gemma3 gemma4 gemma4moe mistral qwen3moe qwen35 qwen35moe gptoss qwen3next ministral llama4; do convert $name f32 $name; done
for type in f16 bf16 q8 q4; do convert smol $type smol-$type; done
