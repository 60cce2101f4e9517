#!/usr/bin/env bash
# The last rank's part of a parameter under DeepSpeed's ZeRO 3 ends in uninitialised memory.
#
# Versions: deepspeed 0.19.8, torch 2.13.0 (CPU, gloo, two processes). Seen 2026-11-30.
# A good guess: `param.ds_tensor` is this rank's part of the parameter, so that a check for NaN, a
# norm or a checksum over the parts of all ranks is one over the parameters.
# What it does: a parameter whose numel does not divide by the number of ranks is padded, by
# torch.empty: what stands behind the numel is whatever was in the memory, and stays so through
# training. Mostly zeros, now and then NaN or anything else: such a check fails once in many runs.
# Shown by letting torch fill new memory with NaN, as it does for deterministic algorithms. Read
# `param.ds_numel - rank * param.ds_tensor.ds_numel` elements at most. Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6 setuptools
cd "$work"
cat > shown.py <<'PYTHON'
import os

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch

torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model = torch.nn.Linear(3, 1, bias=False)  # 3 numbers for 2 ranks
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    },
    dist_init_required=False,
)
for _ in range(3):
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
(parameter,) = model.parameters()
part = parameter.ds_tensor
own = max(min(parameter.ds_numel - rank * part.ds_numel, part.numel()), 0)
print(f"rank {rank}: {part.numel()} elements, {own} of the parameter: {part.tolist()}")
assert part[:own].isfinite().all()
if rank == 1:
    assert part[own:].isnan().all(), "the padding is initialised by now"
PYTHON
"$work/env/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 shown.py 2> errors ||
    { tail -20 errors >&2; exit 1; }
