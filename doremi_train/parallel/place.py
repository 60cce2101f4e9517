"""Place where a process computes: its device, its precision, and the engine that was really got."""

import os
from typing import Any, NamedTuple

import torch

from doremi_train.config import UserError
from doremi_train.parallel import comm, launcher
from doremi_train.parallel.launcher import EngineOptions


class Place(NamedTuple):
    """Place of this process, as it really came out."""

    strategy: str  # single, ddp, fsdp2, zero1, zero2, zero3
    device: torch.device
    compile: bool
    deepspeed: dict[str, Any]  # settings of the JSON file

    def __str__(self) -> str:
        size, backend = comm.world().size, comm.backend()
        compiled = ", compiled" if self.compile else ""
        processes = f"{size} process{'es' * (size > 1)}"
        return f"{self.strategy}, {processes} on {self.device.type} ({backend}){compiled}"


def start(options: EngineOptions, precision: str, timeout: float) -> Place:
    """Join the processes that the launcher started. `timeout` in seconds is how long one may wait
    for another.

    Raises UserError where what was asked for, here or by accelerate's configuration, is not what
    would run.
    """
    asked, file = launcher.asked(options, precision)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    absent = [
        name
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    device = comm.join(options.device == "cpu", timeout) if started == 1 or not absent else None
    size = comm.world().size
    if device is None or size != started:
        because = f"{', '.join(absent)} are not set" if absent else f"only {size} work together"
        raise UserError(
            f"WORLD_SIZE={started}: {started} processes were asked for, but {because}; "
            "start them with torchrun, accelerate launch --config_file launch/accelerate/…, or srun"
        )
    if options.processes not in (None, size):
        raise UserError(
            f"engine.processes={options.processes}: but {size} work together; start them with "
            f"torchrun --nproc_per_node {options.processes} -m doremi_train …, or change the key"
        )
    if asked != "auto" and comm.backend() == "none":
        raise UserError(
            f"engine.strategy={asked}: needs processes that know of each other, and this one was "
            "started alone; start it with torchrun or accelerate launch (one process is enough), "
            "or take engine=auto"
        )
    if asked == "auto":
        asked = "ddp" if size > 1 else "single"
    return Place(asked, device, options.compile, launcher.read_deepspeed(file, asked))
