"""Engines that spread a model over processes: replicated (DDP), sharded (FSDP2), or by DeepSpeed's
ZeRO 1, 2 and 3.

accelerate (or torchrun, or Slurm) starts the processes; `start` joins them and says what was really
got. The wrapping is torch's and DeepSpeed's own on every device, so that what is tested on CPUs is
what runs on GPUs. All engines average gradients over processes and keep parameters in float32.
Each process saves the numbers that it has, by parameter name: a run continues on another number of
processes, or with another engine.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from doremi_train.config import UserError
from doremi_train.model import birth, language_model
from doremi_train.model.language_model import INNER, LanguageModel, Source
from doremi_train.model.optim import MOMENTS, OptimizerOptions
from doremi_train.parallel import comm, native
from doremi_train.parallel.native import Native
from doremi_train.parallel.place import Place
from doremi_train.parallel.zero import Zero
from doremi_train.storage.parts import Piece, Saved


class Engine(Protocol):
    """A model and its optimiser, spread over the processes."""

    model: nn.Module  # to be called for losses; a collective, under sharding
    wrapper: str  # the classes that really hold the model and its optimiser
    optimizer: Any  # as torch's, with `param_groups` and `state`

    def warm_up(self, tokens: Tensor) -> None:
        """Whatever the first step does otherwise than the later ones, done now: a run that
        continues begins there."""

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of a micro-batch's forward and backward; gradients may be exchanged in the
        `last` one only."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar."""

    def step(self, rate: float) -> None:
        """Clip, update with this learning rate, and drop the gradients."""

    def discard(self) -> None:
        """Drop the gradients."""

    def parts(self) -> list[Tensor]:
        """What this process has of every parameter: all of it, unless parameters are divided."""

    def whole(self, names: Collection[str]) -> dict[str, Tensor]:
        """These tensors of the model, whole, on the first process's host memory; none on the
        others. A collective."""

    def pieces(self) -> Iterator[Piece]:
        """What this process has to save of parameters, buffers (model/NAME) and the optimiser's
        state (optimizer/NAME/KEY): all processes together save each number once. Frozen parameters
        are not among them. No collective."""

    def state(self) -> dict[str, Any]:
        """{"model": {name: tensor}, "optimizer": {name: {key: tensor}}}, whole, on the first
        process's host memory; empty dicts on the others. A collective."""

    def close(self) -> None:
        """Let go of the memory."""


def divides(strategy: str) -> bool:
    """Whether an engine divides parameters among the processes."""
    return strategy in ("fsdp2", "zero3")


def frozen(place: Place, model: LanguageModel, divided: bool | None = None) -> LanguageModel:
    """A model that only gives losses, be it shapes alone or complete on every process, with its
    values: divided among the processes (by FSDP2, which goes beside every engine), or whole on
    each. `divided`: None is as the engine does with what it trains. Where it is, its forward is a
    collective."""
    model.eval().requires_grad_(False)
    divided = divides(place.strategy) if divided is None else divided
    if divided and comm.world().size > 1:
        comm.shard(model, model.groups(), place.device, trained=False)
        native.fill(model, place.device)
    else:
        birth.fill(model, place.device)
        model.to(place.device)
    return model


def build(
    place: Place,
    model: LanguageModel,
    training: OptimizerOptions,
    saved: Saved | None = None,
) -> Engine:
    """Spread a model, be it shapes alone or complete on every process, and take over what `pieces`
    of any engine on any number of processes saved.

    Raises UserError for what the strategy cannot do exactly, and where another model was saved.
    """
    if training.optimizer == "adafactor" and place.strategy not in ("single", "ddp"):
        raise UserError(
            f"training.optimizer=adafactor: factors whole matrices, which {place.strategy} cuts; "
            "use adamw, or engine=ddp"
        )
    if place.strategy.startswith("zero") and not all(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"engine={place.strategy}: divides what is trained, and here most of the model is "
            "frozen (LoRA); use engine=ddp or fsdp2"
        )
    if saved is not None:
        require_same_model(model, saved)
        if model.source is not None:
            model.source = _Resumed(saved, model.source)
    if place.strategy.startswith("zero"):
        return Zero(place, model, training, saved)
    return Native(place, model, training, saved)


class _Resumed(NamedTuple):
    """Values of a model that goes on."""

    saved: Saved
    others: Source

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        path = f"model/{INNER}{name}"
        if path not in self.saved.shapes:
            return self.others(name, rows)
        if rows is None:
            return self.saved.whole(path)
        count, *row = self.saved.shapes[path][0]
        first, last, _ = rows.indices(count)
        size = math.prod(row)
        return self.saved.read(path, first * size, last * size).view(-1, *row).clone()


def require_same_model(model: LanguageModel, saved: Saved) -> None:
    """Raises UserError where the tensors saved are not a model's, by name, shape and type."""
    wanted = {
        f"model/{name}": (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in language_model.trained_of(model)
    }
    there = {name: of for name, of in saved.shapes.items() if name.startswith("model/")}
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            given, needed = (
                f"{of[name][1]} {list(of[name][0])}" if name in of else "nothing"
                for of in (there, wanted)
            )
            raise UserError(
                f"{saved.folder}: holds {given} for {name}, and the model has {needed}; it is of "
                f"another model or version: delete {saved.folder.parent}, and the run begins again"
            )
    for name, (shape, _) in saved.shapes.items():
        path, _, key = name.rpartition("/")
        parameter = path.replace("optimizer/", "model/", 1)
        if key in MOMENTS and (parameter not in wanted or wanted[parameter][0] != shape):
            raise UserError(
                f"{saved.folder}: holds {list(shape)} for {name}, which is not the shape of that "
                f"parameter; delete {saved.folder.parent}, and the run begins again"
            )
