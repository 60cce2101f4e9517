"""LESS on a llama of 1.1B in bf16, with LoRA of the paper's rank: an example's gradient in batches
with a sparse projection, or straight against a target, over one example at a time with a dense
projection."""

import argparse
from functools import partial

import torch

from benchmarks import common, less
from benchmarks.gpu import sized
from benchmarks.gpu.record import Record, at_most, main

_RANK = 128
_EXAMPLES = 48
_LARGE = {"width": 2048, "layers": 16, "vocabulary": 1 << 15, "tokens": 8192}
_REHEARSED = {"width": 64, "layers": 1, "vocabulary": 64, "tokens": 512}
_GOAL = at_most(1 / 3)


def measure(record: Record) -> None:
    device = record.device
    given = argparse.Namespace(
        **_REHEARSED if record.rehearse else _LARGE, precision="bf16", device=str(device)
    )
    rank, count = (8, 4) if record.rehearse else (_RANK, _EXAMPLES)
    torch.set_num_threads(1)
    of = less.setting(rank, count, 1, given)
    record.figure("parameters", less.every(of) / 1e9, "10⁹")
    matrix = torch.randint(0, 2, (less.BLOCK, less.SIZE), device=device).float() * 2 - 1
    turns = {
        "one at a time, dense": partial(less.published, of, matrix),
        "ours": partial(less.features, of),
        "ours, against a target": partial(less.direct, of, 1),
    }
    found = sized.rounds(turns, record.left() / 2, 4)
    for side, seconds in sized.median(found).items():
        record.figure(side, 1e3 * seconds / count, "ms an example")
    for side in list(turns)[1:]:
        gain = common.ratio(found[side], found["one at a time, dense"])
        record.figure(f"{side} over one at a time", gain, goal=_GOAL)


if __name__ == "__main__":
    main("influence", measure)
