#!/usr/bin/env bash
# Every epoch of LitData's weighted CombinedStreamingDataset makes the same draws.
#
# Versions: litdata 0.2.76, torch 2.13.0. Seen 2026-11-30.
# A good guess: an epoch ends when the first source does, and the next one draws anew, as its sources
# are shuffled anew; so a source of small weight comes as often as its weight says, in the long run.
# What it does: the draw is seeded by `seed` alone. All epochs take the sources in the same order, and
# a source that is not drawn before the first one ends is never drawn, for how many epochs ever.
# Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q litdata==0.2.76 torch==2.13.0
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import collections

import torch
from litdata import CombinedStreamingDataset, StreamingDataset, TokensLoader
from litdata.streaming.cache import Cache

BLOCK, WEIGHTS = 8, {"large": 0.6, "small": 0.3995, "rare": 0.0005}
for number, (name, blocks) in enumerate({"large": 5000, "small": 136, "rare": 100}.items()):
    cache = Cache(name, chunk_size=BLOCK * blocks, item_loader=TokensLoader(BLOCK))
    for block in range(blocks):
        cache[block] = torch.full((BLOCK,), number, dtype=torch.int)
    cache.done()
    cache.merge()
sources = [
    StreamingDataset(name, item_loader=TokensLoader(BLOCK), shuffle=True, drop_last=True)
    for name in WEIGHTS
]
mixed = CombinedStreamingDataset(
    sources, seed=0, weights=tuple(WEIGHTS.values()), iterate_over_all=False
)
epochs = []
for epoch in range(100):
    mixed.set_epoch(epoch + 1)
    epochs.append([int(sample[0]) for sample in mixed])
drawn = collections.Counter(number for epoch in epochs for number in epoch)
total = sum(drawn.values())
print(f"100 epochs, {total} draws, {len({tuple(epoch) for epoch in epochs})} different epoch")
for number, (name, weight) in enumerate(WEIGHTS.items()):
    print(f"  {name:<6} expected {weight * total:7.1f}, drawn {drawn[number]}")
assert len({tuple(epoch) for epoch in epochs}) == 1
assert drawn[2] == 0 and WEIGHTS["rare"] * total > 10
PYTHON
