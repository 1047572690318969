#!/bin/bash
# For changes that must not change a bit: prints a hash of each kind of result on every committed model, so that two
# builds, instruction sets or thread counts can be compared with diff.
#   tests/same.sh RUN ISA [MODEL PROFILE] >before     RUN: ./run, or "qemu-aarch64 -cpu max build/neon/run"
# With a MODEL (models/smollm2.kvz models/smollm2.kvp) its logits, scores, caches, answers and streams as well.
set -u
cd "$(dirname "$0")/.." || exit 1
run=$1 isa=$2 model=${3:-} profile=${4:-}
for f in $model $profile; do [ -f "$f" ] || { echo "same.sh: there is no $f" >&2; exit 1; }; done
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
head -c 1500 eval/calibration.txt >"$dir/short"
head -c 6000 eval/calibration.txt >"$dir/long"

hash() { # what; the file $dir/out
    echo "$isa $1 $(sha256sum <"$dir/out" | cut -c1-16)"
}

made() { # what, command and flags: hashes the file it writes
    rm -f "$dir/out"
    $run "${@:2}" -o "$dir/out" --isa "$isa" -q || echo "$1: status $?"
    hash "$1"
}

said() { # what, command and flags: hashes what it prints
    $run "${@:2}" --isa "$isa" -q >"$dir/out" || echo "$1: status $?"
    hash "$1"
}

small() { # a committed model
    local f=tests/fixtures/$1.kvz
    made "$1 logits" logits "$f" -f "$dir/short"
    made "$1 logits q8/q4" logits "$f" -f "$dir/short" --kv q8/q4
    for p in kvzip kvzip+ expected observed snapkv tova keydiff knorm streaming random; do
        made "$1 score $p" score "$f" -f "$dir/short" --policy $p --chunk 150
    done
    made "$1 score local" score "$f" -f "$dir/short" --score-attn local --chunk 100
    while read -r how; do
        made "$1 compress $how" compress "$f" -f "$dir/short" $how
        cp "$dir/out" "$dir/cache"
        said "$1 ask $how" ask "$f" "$dir/cache" "What?" "And then, who was it?" -n 12
    done <<'FLAGS'
--level pair
--level uniform
--level head --ref-ties
--level layer --set safeguard=0.2
--level pyramid --policy snapkv
--kv q8/q4
--demote q2
--kv f32
--policy knorm --stream --window 32
--policy expected --budget 60 --window 32
FLAGS
}

large() { # a real one, with its profile
    made "model logits" logits "$model" -f "$dir/long"
    for p in kvzip expected kvzap "kvzap --set expected=1" "kvzip --score-attn local"; do
        made "model score $p" score "$model" -f "$dir/long" --profile "$profile" --policy $p
    done
    while read -r how; do
        made "model compress $how" compress "$model" -f "$dir/long" $how
        cp "$dir/out" "$dir/cache"
        said "model ask $how" ask "$model" "$dir/cache" -f demo/questions.tsv -n 24 --stop .
        said "model ask --keep $how" ask "$model" "$dir/cache" -f demo/questions.tsv -n 16 --keep --temp 0.8 --seed 3
    done <<FLAGS
--policy kvzip
--profile $profile
--profile $profile --kv q8/q4
--profile $profile --stream
--profile $profile --policy kvzap --budget 300
--demote q2
FLAGS
    said "model generate" generate "$model" -p "Once upon a time" -n 60 --seed 7
    said "model generate --budget" generate "$model" -p "Once upon a time" -n 200 --seed 7 --budget 64 --window 16
    printf 'Hello\nWho are you?\n' >"$dir/talk"
    said "model chat" chat "$model" -c "$dir/cache" -n 30 --seed 5 <"$dir/talk"
}

for name in smol smol-q8 smol-q4 smol-f16 smol-bf16 llama qwen2 qwen3 gemma3 mistral gptoss; do small $name; done
if [ -n "$model" ]; then large; fi
