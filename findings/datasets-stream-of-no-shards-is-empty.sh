#!/usr/bin/env bash
# A datasets stream of 0 shards has no rows, and does not say so.
#
# Versions: datasets 5.2.0. Seen 2026-11-30.
# A good guess: to_iterable_dataset(num_shards=N) with N from a number of DataLoader workers, whose 0
# means "in this process", either refuses 0 or gives all rows in one shard.
# What it does: with 0 the stream is empty, and so is what interleave_datasets draws of it: a mixture
# of such streams ends at once, or is of the other sources alone. LLaMA-Factory 0.9.5 passes
# dataloader_num_workers there, by default 0, for local files under `streaming: true`.
# Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q datasets==5.2.0
cd "$work"
"$work/env/bin/python" -W error - <<'PYTHON'
from datasets import Dataset, interleave_datasets

rows = {name: Dataset.from_list([{"of": name}] * 50) for name in ("a", "b")}
counts = {
    shards: len(list(rows["a"].to_iterable_dataset(num_shards=shards))) for shards in (2, 1, 0)
}
print("rows of 50, by shards:", counts)
assert counts == {2: 50, 1: 50, 0: 0}
for strategy in ("first_exhausted", "all_exhausted"):
    mixed = interleave_datasets(
        [rows["a"].to_iterable_dataset(num_shards=0), rows["b"].to_iterable_dataset(num_shards=1)],
        probabilities=[0.5, 0.5], seed=0, stopping_strategy=strategy,
    )
    drawn = [row["of"] for row in mixed.take(100)]
    print(f"{strategy}: {drawn.count('a')} of a, {drawn.count('b')} of b")
    assert drawn.count("a") == 0
PYTHON
