#!/usr/bin/env bash
# The whole pipeline as jobs that wait for each other: prepare → reference → proxy → main → report. Prints their numbers.
#   launch/slurm/pipeline.sh --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 -- run_dir=runs/big data.root=/data/corpus …
#   before the "--": options of sbatch for the training jobs (prepare and report run as one task of one node)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -gt 0 ] && shift

after=
for stage in prepare reference proxy main report; do
    small=()
    case $stage in prepare | report) small=(--nodes=1 --ntasks=1 --ntasks-per-node=1) ;; esac
    job=$(sbatch --parsable --job-name="doremi-$stage" ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} \
        "${options[@]}" "${small[@]}" "$here/stage.sbatch" "$@" "stage=$stage")
    after=${job%%;*}
    echo "$stage $after"
done
