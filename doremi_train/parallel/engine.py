"""Engines that spread a model over processes: replicated (DDP), sharded (FSDP2), or by DeepSpeed's
ZeRO 1, 2 and 3.

accelerate (or torchrun, or Slurm) starts the processes; `start` joins them and says what was really
got. The wrapping is torch's and DeepSpeed's own on every device, so that what is tested on CPUs is
what runs on GPUs. All engines average gradients over processes and keep parameters in float32.
Their state is saved whole, by parameter name: a run continues on another number of processes, or
with another engine.
"""

import contextlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from doremi_train.config import UserError
from doremi_train.model import language_model
from doremi_train.model.language_model import INNER, LanguageModel, Source
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel.native import Native
from doremi_train.parallel.place import Place
from doremi_train.parallel.zero import Zero


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

    def state(self) -> dict[str, Any]:
        """{"model": {name: tensor}, "optimizer": {name: {key: tensor}}}, whole, on the first
        process's host memory; empty dicts on the others. A collective."""

    def close(self) -> None:
        """Let go of the memory."""


def build(
    place: Place,
    model: LanguageModel,
    training: OptimizerOptions,
    state: Mapping[str, Any] | None = None,
) -> Engine:
    """Spread a model, be it shapes alone or complete on every process, after taking over what
    `state` of any engine on any number of processes gave. Raises UserError for what the strategy
    cannot do exactly."""
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
    if state is not None and model.source is not None:
        model.source = _Resumed(state["model"], model.source)
    elif state is not None:  # before the model is in parts
        for name, tensor in language_model.tensors_of(model):
            if name in state["model"]:  # frozen parameters are as they were
                tensor.data.copy_(state["model"][name])
    moments = state["optimizer"] if state is not None else {}
    if place.strategy.startswith("zero"):
        return Zero(place, model, training, moments)
    return Native(place, model, training, moments)


class _Resumed(NamedTuple):
    """Values of a model that goes on."""

    saved: Mapping[str, Tensor]
    others: Source

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        value = self.saved.get(INNER + name)
        if value is None:
            return self.others(name, rows)
        return (value if rows is None else value[rows]).clone()
