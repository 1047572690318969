#!/bin/sh
#SBATCH --job-name=kvzip-eval --output=%x.%A.%a.log
# sbatch --array=1-N eval/slurm.sh OUT run eval MODEL TASKS..: a shard for each task of a Slurm array, from a shared folder.
#
# Each has OUT.I and the processors of --cpus-per-task; a task that is repeated goes on where it stopped. Afterwards:
#   run eval --merge OUT.* -o OUT
set -eu
if [ $# -lt 4 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "usage: sbatch --array=1-N $0 OUT run eval MODEL TASKS.. [flags]" >&2
    exit 2
fi
out=$1
shift
exec "$@" -q -j "${SLURM_CPUS_PER_TASK:-1}" -o "$out.$SLURM_ARRAY_TASK_ID" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
