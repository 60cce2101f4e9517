"""The only user of torch.distributed collectives. On one process each of these is the identity."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from doremi_train.world import World

Sums = TypeVar("Sums", bound=NamedTuple)
T = TypeVar("T")


def world() -> World:
    """This process among all."""
    return World(dist.get_rank(), dist.get_world_size()) if _many() else World()


def all_reduce_sum(sums: Sums, flag: bool = False) -> tuple[Sums, bool]:
    """Add a NamedTuple of float64 tensors over ranks, and ask whether any rank raised `flag`: one exchange.

    Every rank gets the same bits, because the backend reduces once and distributes the result.
    """
    if not _many():
        return sums, flag
    fields: tuple[Tensor, ...] = tuple(sums)
    flat = torch.cat([*(field.double().flatten() for field in fields), fields[0].new_tensor([flag]).double()])
    dist.all_reduce(flat)
    parts = flat[:-1].split([field.numel() for field in fields])
    return type(sums)(*(p.view_as(f) for p, f in zip(parts, fields, strict=True))), bool(flat[-1] > 0)


def barrier() -> None:
    if _many():
        dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank (any picklable object of our own)."""
    if not _many():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(function: Callable[[], T]) -> T:
    """Run on rank 0 alone and give its result to every rank. Its exception is raised on every rank, so none waits."""
    if not _many():
        return function()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (function(), None)
        except Exception as error:  # carried to every rank and raised there
            outcome = (None, error)
    value, failure = broadcast(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
