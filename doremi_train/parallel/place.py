"""Place where a process computes: its device, its precision, and the engine that was really got."""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from doremi_train.config import UserError
from doremi_train.parallel import comm, launcher
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.parallel.meeting import LAUNCHED


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


def room(device: torch.device) -> int:
    """Bytes that each process here has where it computes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    together = int(os.environ.get("LOCAL_WORLD_SIZE", comm.world().size))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // together


def start(
    options: EngineOptions,
    precision: str,
    timeout: float,
    check: Callable[[], None] = lambda: None,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> Place:
    """Join the processes that the launcher started. `timeout` in seconds is how long one may wait
    for another; while they gather, `check` is called, and may raise. `said`, JSON values by key, is
    what all must be about to do.

    Raises UserError where what was asked for, here or by accelerate's configuration, is not what
    would run.
    """
    asked, file = launcher.asked(options, precision)
    started = _started()
    absent = [name for name in LAUNCHED if name not in os.environ and name != "WORLD_SIZE"]
    met = started == 1 or not absent
    device = comm.join(options.device == "cpu", timeout, check, said) if met else None
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


class Mislaunched(UserError):
    """A process was told what cannot be."""

    alone = True  # the first process may have been told well


def _started() -> int:
    """Processes that were started, as the launcher says. Raises Mislaunched for what it cannot have
    said."""
    if "WORLD_SIZE" not in os.environ:
        return 1
    size = _number("WORLD_SIZE", 1, 10**6)
    _number("RANK", 0, size - 1)
    _number("MASTER_PORT", 1, 65_535)
    return size


def _number(name: str, least: int, most: int) -> int:
    given = os.environ.get(name, str(least))
    if not given.isdecimal() or not least <= int(given) <= most:
        raise Mislaunched(
            f"{name}={given}: must be a number from {least} to {most}; correct it, or start the "
            "processes with torchrun, accelerate launch or srun, which set it"
        )
    return int(given)
