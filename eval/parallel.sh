#!/bin/sh
# parallel.sh N OUT run eval MODEL TASKS..: N shards at once by GNU parallel, then one file and one table of all.
#
# Each shard has OUT.I and its share of the processors (or THREADS of them); what is done already is not done again. Other
# machines take part where the folder is shared: PARALLEL='--sshloginfile hosts --workdir .' in the environment.
set -eu
[ $# -ge 4 ] || { echo "usage: $0 N OUT run eval MODEL TASKS.. [flags]" >&2; exit 2; }
n=$1 out=$2
shift 2
threads=${THREADS:-$((($(getconf _NPROCESSORS_ONLN) + n - 1) / n))}
parallel --halt now,fail=1 --quote "$@" -q -j "$threads" -o "$out.{}" --shard "{}/$n" ::: $(seq "$n") >/dev/null
"$1" eval --merge $(seq -f "$out.%.0f" "$n") -o "$out"
