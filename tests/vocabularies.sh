#!/bin/sh
# Ids of 200 KB of text in many scripts, with the vocabularies of Qwen 2 and Llama 3, equal to the reference's (hashes
# in tests/fixtures/real/ids.json). Fetches the packages dashscope and llama-models (10 MB); part of .ci/run.
set -u
cd "$(dirname "$0")/.."
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0

.venv/bin/python -m pip download -q --no-deps -d "$dir" dashscope llama-models || exit 1
for wheel in "$dir"/*.whl; do .venv/bin/python -m zipfile -e "$wheel" "$dir" || exit 1; done

check() { # name in ids.json, file, flags of export.py
    .venv/bin/python export.py "$dir/$2" --tokenizer-only -o "$dir/$1.kvz" ${3:-} ${4:-}
    ./run tokenize "$dir/$1.kvz" -f tests/fixtures/real/text.txt >"$dir/ids"
    if python3 - "$dir/ids" "$1" <<'PY'
import hashlib, json, sys
ids = open(sys.argv[1]).read().strip()
sys.exit(hashlib.sha256(ids.encode()).hexdigest() != json.load(open("tests/fixtures/real/ids.json"))[sys.argv[2]]["sha256"])
PY
    then passed=$((passed + 1)); else failed=$((failed + 1)); echo "ids of $1 differ from the reference's"; fi
}

check qwen2 dashscope/resources/qwen.tiktoken --split qwen2
check llama3 llama_models/llama3/tokenizer.model
echo "vocabularies: $passed passed, $failed failed"
[ $failed -eq 0 ]
