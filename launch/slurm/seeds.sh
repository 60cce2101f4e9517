#!/usr/bin/env bash
# The whole job for several seeds as a job array that shares one store, then a report over all of them. Prints job numbers.
#   launch/slurm/seeds.sh --array=0-4 --ntasks-per-node=8 --gpus-per-node=8 -- run_dir=runs/seeds data.root=/data/corpus …
#   seed and array index are one number; what the seeds have in common is prepared once, in run_dir/store
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -gt 0 ] && shift

seeds=$(sbatch --parsable "${options[@]}" "$here/stage.sbatch" "$@")
seeds=${seeds%%;*}
echo "seeds $seeds"
small=(--nodes=1 --ntasks=1 --ntasks-per-node=1)
for option in "${options[@]}"; do [[ $option == --array=* ]] || small=("$option" "${small[@]}"); done
report=$(sbatch --parsable --job-name=doremi-report --dependency=afterok:"$seeds" --kill-on-invalid-dep=yes \
    "${small[@]}" "$here/stage.sbatch" "$@" stage=report)
echo "report ${report%%;*}"
