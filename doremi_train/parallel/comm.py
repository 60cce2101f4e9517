"""The only user of torch.distributed. On one process each of these is the identity.

No call waits longer than `timeout` seconds for another process. What rank 0 does alone (tokenise,
save, wait for a lock) may take hours: the others wait in `on_first`, where rank 0 gives a sign of
life every few seconds.
"""

import datetime
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from doremi_train.config import fingerprint
from doremi_train.parallel import heap
from doremi_train.parallel.agreement import ERROR, Differ, differences, statement
from doremi_train.parallel.meeting import LAUNCHED, Meeting, Unmet
from doremi_train.parallel.world import World

Sums = TypeVar("Sums", bound=NamedTuple)
T = TypeVar("T")

_SIGN_OF_LIFE = 5.0  # seconds
_LAST_WORDS = 30.0  # seconds that a process which ends waits for the others to come
_WRAPPING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


class Lost(Exception):
    """Another process ended, or did not answer in time. Exit code 1: the same command continues the
    run."""

    exit_code = 1
    alone = True  # the first process may be the one that is gone: each says it


class _Together(NamedTuple):
    """Process group that `join` made."""

    group: Any = None  # for rank 0's work and objects: gloo, on the host
    timeout: float = 0.0
    # What accelerate's launcher said, to be put back.
    environment: Mapping[str, str] = MappingProxyType({})


_together = _Together()


_stores: dict[tuple[str, int, int, int], Any] = {}
_meetings = 0  # of this process: every other one has had as many
_met: Meeting | None = None  # the last of them


def join(
    cpu: bool,
    timeout: float,
    check: Callable[[], None] = lambda: None,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> torch.device:
    """Meet the other processes that the launcher started; returns this one's device. `said`, JSON
    values by key, is what they must all be about to do.

    Raises Unmet where they have not met after `timeout` seconds, Differ where they said other
    things, and meanwhile whatever `check` raises.
    """
    from accelerate import PartialState

    global _together, _met
    cpu = (
        cpu
        or not torch.accelerator.is_available()
        or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    )
    # How to wrap is the engine's business: neither accelerate nor transformers must act on these by
    # themselves.
    wrapping = {name: os.environ.pop(name) for name in _WRAPPING if name in os.environ}
    _together = _Together(None, timeout, wrapping)
    limit = datetime.timedelta(seconds=timeout)
    met: dict[str, Any] = {}
    if all(name in os.environ for name in LAUNCHED):
        meeting = _met = Meeting()
        store = meeting.hold(
            lambda meeting: _connect(meeting, limit), statement(said), timeout, check
        )
        met = {"store": store, "rank": meeting.rank, "world_size": meeting.size}
    place = PartialState(cpu=cpu, timeout=limit, **met)
    if _many():
        _together = _together._replace(group=dist.new_group(backend="gloo", timeout=limit))
    return place.device


def _connect(meeting: Meeting, limit: datetime.timedelta) -> Any:
    """The store at the meeting's address, with keys of this meeting alone."""
    global _meetings
    _meetings += 1
    # Kept for the next meeting, so that nobody finds the last one's server going down.
    at = (meeting.address, meeting.port, meeting.rank, meeting.size)
    if at not in _stores:
        # torchrun's agent may be the server; otherwise the first process is.
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        _stores[at] = dist.TCPStore(
            meeting.address,
            meeting.port,
            meeting.size,
            is_master=meeting.rank == 0 and not agent,
            timeout=limit,
            wait_for_workers=False,  # it would not say who is missing
            multi_tenant=not agent,
        )
    return dist.PrefixStore(f"meeting {_meetings}", _stores[at])


def spoken_for(message: str) -> tuple[bool, str]:
    """End with this message: whether the first process speaks for this one, as it ends with the
    same, and the message, which says more where the processes had not met, and end differently."""
    global _met
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not all(map(str.isdecimal, numbers)) or "MASTER_ADDR" not in os.environ or numbers[1] == "1":
        return True, message
    if _met is None:
        _met, limit = Meeting(), datetime.timedelta(seconds=_LAST_WORDS)
        said = {ERROR: message}
        try:
            _met.hold(lambda meeting: _connect(meeting, limit), said, _LAST_WORDS)
        except Differ as differ:
            message = str(differ)
        except Unmet:
            return False, message
    return _met.part(message), message


def leave() -> None:
    """Part from the others; a next `join` in this process may want another device."""
    from accelerate.state import PartialState

    global _together
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(_together.environment)
    _together = _Together()
    PartialState._reset_state()


def world() -> World:
    """This process among all."""
    return World(dist.get_rank(), dist.get_world_size()) if _many() else World()


def patience() -> float:
    """Seconds that a call waits for another process."""
    return _together.timeout or float("inf")


def backend() -> str:
    """gloo, nccl, …; none where this process was started alone."""
    return dist.get_backend() if dist.is_available() and dist.is_initialized() else "none"


# ── Values ──────────────────────────────────────────────────────────────────────────


def all_reduce_sum(sums: Sums, flag: bool = False) -> tuple[Sums, bool]:
    """Add a NamedTuple of float64 tensors over ranks, and ask whether any rank raised `flag`: one
    exchange, and one copy to the host, where the result is.

    Every rank gets the same bits, because the backend reduces once and distributes the result.
    """
    fields: tuple[Tensor, ...] = tuple(sums)
    if not _many() and fields[0].device.type == "cpu":
        return sums, flag
    flat = torch.cat(
        [*(field.double().flatten() for field in fields), fields[0].new_tensor([flag]).double()]
    )
    if _many():
        dist.all_reduce(flat)
    flat = flat.cpu()
    parts = flat[:-1].split([field.numel() for field in fields])
    return type(sums)(*(p.view_as(f) for p, f in zip(parts, fields, strict=True))), bool(
        flat[-1] > 0
    )


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over ranks, in place: what DDP does to gradients."""
    if not _many():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]).div_(dist.get_world_size())
    dist.all_reduce(flat)
    for tensor, mean in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(mean.view_as(tensor))


def any_of(flag: bool) -> bool:
    """Whether any rank raised `flag`, on every rank."""
    if not _many():
        return flag
    found = torch.tensor([flag], dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_together.group)
    return bool(found)


def barrier() -> None:
    if _many():
        dist.barrier(group=_together.group)


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank (any picklable object of our own)."""
    if not _many():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_together.group)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value (any picklable object of our own), on every rank."""
    if not _many():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_together.group)
    return values


def agree(values: Mapping[str, Any]) -> None:
    """See to it that all processes have the same JSON values by key. Raises Differ, which names the
    ranks and the keys, on every rank."""
    if not _many():
        return
    mine = statement(values)
    if len({*gather(fingerprint(mine))}) > 1:
        raise Differ(str(differences(gather(mine))))


def on_first(function: Callable[[], T]) -> T:
    """Run on rank 0 alone and give its result to every rank. Its exception is raised on every rank,
    so none waits."""
    if not _many():
        return function()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if dist.get_rank() == 0:
        with _SignsOfLife():
            try:
                outcome = (function(), None)
            except Exception as error:  # carried to every rank and raised there
                outcome = (None, error)
    else:
        while _sign(working=False):
            pass
    value, failure = broadcast(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


class _SignsOfLife:
    """While rank 0 works, a thread tells the others that it still does; at the end, that it is
    done."""

    def __enter__(self) -> None:
        self._done = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._give, name="sign of life", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        _sign(working=False)

    def _give(self) -> None:
        try:
            while not self._done.wait(min(_SIGN_OF_LIFE, _together.timeout / 4)):
                _sign(working=True)
        except Exception as error:  # raised by the main thread
            self._failure = error


def _sign(working: bool) -> bool:
    sign = torch.tensor([working])
    dist.broadcast(sign, src=0, group=_together.group)
    return bool(sign)


def explain(error: BaseException) -> BaseException:
    """The error itself, or `Lost` with a clear message where it says that another process is
    gone."""
    if isinstance(error, Lost) or not dist.is_available():
        return error
    text = str(error)
    gone = isinstance(error, dist.DistError) or (
        _many()
        and isinstance(error, RuntimeError)
        and any(sign in text for sign in ("gloo", "NCCL", "Connection closed by peer"))
    )
    if not gone:
        return error
    cause = text.splitlines()[0].rpartition("] ")[2][:200]
    return Lost(
        "another process ended, or did not answer within "
        f"training.timeout={_together.timeout:g} s ({cause}); look at its own output. "
        "The same command continues from the last checkpoint"
    )


# ── Tensors in parts ────────────────────────────────────────────────────────────────


def shard(
    model: nn.Module,
    groups: Iterable[Sequence[nn.Module]],
    device: torch.device,
    trained: bool = True,
) -> None:
    """Divide the parameters of every group of modules, and then the rest, among all processes
    (FSDP2), in place: a group is gathered when one of its modules is called. `trained`: what is
    left of it at the end of a forward, as after a group that is not called whole, and the rest stay
    gathered until the backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cpu":
        heap.give_back()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    divided: list[Any] = [fully_shard([*group], mesh=mesh)[0] for group in groups]
    divided.append(fully_shard(model, mesh=mesh, reshard_after_forward=not trained))
    if dist.get_backend(mesh.get_group()) == "gloo":
        for part in divided:
            part.set_custom_reduce_scatter(_InPlace())


class _InPlace:
    """How FSDP2 adds gradients up where gloo does it, which has no call that gives each process its
    own part alone: it adds all, of a copy, and here in the buffer itself."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        dist.all_reduce(input_tensor, op, group)
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be in parts. A collective where it is."""
    return tensor.detach().full_tensor() if in_parts(tensor) else tensor.detach()  # type: ignore[attr-defined]


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be in parts."""
    return tensor.detach().to_local() if in_parts(tensor) else tensor.detach()  # type: ignore[attr-defined]


def span(tensor: Tensor) -> tuple[int, int]:
    """Which numbers this process holds of a tensor that may be in parts, counted in the whole in
    one row: from, to."""
    if not in_parts(tensor):
        return 0, tensor.numel()
    own, row = rows(tensor), tensor.shape[1:].numel()
    return own.start * row, own.stop * row


def rows(tensor: Tensor) -> slice:
    """The rows of the whole that this process holds of a tensor in parts."""
    # FSDP2 divides rows as torch.chunk does: all parts but the last ones are of one size.
    count, size = tensor.shape[0], -(-tensor.shape[0] // dist.get_world_size())
    first = min(dist.get_rank() * size, count)
    return slice(first, min(first + size, count))


def placed(own: Tensor, like: Tensor) -> Tensor:
    """The tensor in parts, cut as `like`, of which this process holds `own`."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)


def in_parts(tensor: Tensor) -> bool:
    """Whether every process holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# Said of torch's and DeepSpeed's own calls, on every process, at every start.
warnings.filterwarnings("ignore", r"`torch.distributed\..*` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
