#!/usr/bin/env bash
# A step of DeepSpeed's ZeRO 1 or 2 takes a bucket of 500 million numbers for a model of 12, and
# torch's deterministic mode writes all of it.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, one process). Seen 2026-11-30.
# A good guess: reduce_bucket_size (default 5e8) is a limit, so that small models need not set it;
# and torch.use_deterministic_algorithms costs little where every kernel is deterministic anyway.
# What it does: the bucket's buffer is allocated anew in every step, as long as the limit whatever the
# model's size (2 GB of float32), twice with overlap_comm. Memory that nobody touches costs a CPU
# nothing, but deterministic mode also fills new memory with NaN
# (torch.utils.deterministic.fill_uninitialized_memory): 2 GB are written at every step, which took
# 400 to 900 times as long. Set reduce_bucket_size to the model's numel, or the fill to False.
# Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6 setuptools
cd "$work"
cat > shown.py <<'PYTHON'
import os
import time

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
from torch.utils._python_dispatch import TorchDispatchMode

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
torch.distributed.init_process_group("gloo")
SIZE = 500_000_000


class Large(TorchDispatchMode):
    """Counts tensors of at least 100 million numbers that are made."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if "empty" in str(func) and made.numel() >= SIZE // 5:
            assert made.numel() == SIZE
            self.count += 1
        return made


def start(stage: int, **more: int) -> deepspeed.DeepSpeedEngine:
    model = torch.nn.Linear(3, 4, bias=False)
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, **more},
            "zero_allow_untested_optimizer": True,
        },
        dist_init_required=False,
    )[0]


def step(engine: deepspeed.DeepSpeedEngine) -> float:
    begun = time.perf_counter()
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    return time.perf_counter() - begun


for stage in (1, 2):
    engine = start(stage)
    torch.use_deterministic_algorithms(True)
    step(engine)
    with Large() as large:
        step(engine)
        step(engine)
    torch.utils.deterministic.fill_uninitialized_memory = False
    plain = min(step(engine) for _ in range(5))
    torch.utils.deterministic.fill_uninitialized_memory = True
    filled = min(step(engine) for _ in range(5))
    small = start(stage, reduce_bucket_size=12)
    step(small)
    short = min(step(small) for _ in range(5))
    torch.use_deterministic_algorithms(False)
    print(
        f"stage {stage}: {large.count / 2:g} buffers of {SIZE:,} numbers a step; a step filled takes "
        f"{filled / plain:.0f} times one that is not, and {filled / short:.0f} times one with a "
        "bucket of the model's size"
    )
    assert large.count >= 2, "no such buffer any more"
    assert filled > 5 * plain and filled > 5 * short
PYTHON
RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29571 "$work/env/bin/python" shown.py 2> errors ||
    { tail -20 errors >&2; exit 1; }
