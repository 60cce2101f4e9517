"""Task of a trainer: what is trained, on what, and how."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le
from pydantic.dataclasses import dataclass
from torch import nn

from doremi_train.config import STRICT, Count, Finite, Positive, UserError
from doremi_train.console import Bar
from doremi_train.data.batches import Store
from doremi_train.data.sampler import Ints, Subsample
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.methods import Objective
from doremi_train.model.language_model import LanguageModel
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel import place
from doremi_train.storage.runs import Run
from doremi_train.training import batch_selection, domain_gradients
from doremi_train.training.followed import Followed
from doremi_train.training.frozen import Reference


@dataclass(frozen=True, config=STRICT)
class TrainingOptions(OptimizerOptions):
    steps: Positive = 400
    """Optimiser steps of a run."""

    batch_size: Positive = 32
    """Sequences per optimiser step, over all processes."""

    micro_batch_size: Positive | None = None
    """Most sequences per process and forward; null: the process's whole share."""

    sequence_length: Positive = 128
    """Tokens of a sequence."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of forward and backward; parameters and α stay fp32 and fp64."""

    activation_checkpointing: bool = False
    """Whether activations are computed a second time in the backward instead of kept."""

    checkpoint_every: Positive = 100
    """Steps between checkpoints."""

    keep_checkpoints: Positive = 2
    """Checkpoints that are kept of a run."""

    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""

    snapshots: Count = 0
    """Models kept on the way, evenly spread over the steps, for downstream.tasks."""

    loss_weighting: Literal["none", "imp", "dimp", "rho"] = "none"
    """How the main runs weigh tokens against the reference; see weighting."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Where a loss is not finite, whether to end the run or to leave the batch out."""

    timeout: Annotated[float, Gt(0), Le(10_000_000), Finite()] = 600.0
    """Seconds to wait for another process before giving it up for lost."""

    threads: Annotated[int, Ge(0), Le(4096)] = 0
    """Threads of torch on a CPU, per process; 0: torch's own choice."""


class TrainingFailed(Exception):
    """The run cannot go on. Exit code 1, one message, no traceback."""

    exit_code = 1


class Task(NamedTuple):
    """Run to train: on what, and towards what."""

    label: str
    run: Run
    objective: Objective
    objective_options: Any
    store: Store
    seed: int
    training: TrainingOptions
    evaluation: EvaluationOptions
    accumulation: Literal["exact", "lagged"] = "lagged"
    reference: Reference | None = None
    subsample: Subsample | None = None  # the part of every domain that is read; None: all
    # Of more candidates than are trained on; None: no selection.
    selection: batch_selection.Setting | None = None
    # Of an objective that looks at every domain's gradient; None: losses.
    target: domain_gradients.Target | None = None
    # Whether a run is done before its steps are, by the objective's state; None: never.
    settled: Callable[[Any], bool] | None = None
    followed: Followed | None = None  # says what is drawn, in place of the objective
    bar: Bar | None = None  # that this run moves on; None: one of its own

    def ends(self, position: "Position") -> bool:
        """Whether there is no step after `position`."""
        done = self.settled is not None and self.settled(position.state)
        return done or position.step >= self.training.steps


class Position(NamedTuple):
    """Position of a run, beside its model and optimiser."""

    step: int  # optimiser steps done
    state: Any  # of the objective
    counts: Ints  # (K,) sequences drawn
    skipped: int = 0  # batches left out because a loss was not finite


Watch = Callable[[Mapping[str, Any]], None]  # gets every line of the logs as it is written


def refuse_accumulation(task: Task, model: LanguageModel, place: place.Place) -> None:
    """Raise UserError for what cannot be exact when a batch comes in several micro-batches."""
    if task.accumulation == "exact" and has_dropout(model):
        raise UserError(
            f"{task.label}: its weights are those of the whole batch, so with several "
            "micro-batches (proxy.accumulation=exact, or training.loss_weighting) every forward "
            "runs twice, which must agree: the model may not have dropout; set its dropout to 0, "
            "raise training.micro_batch_size so that one is enough, or use "
            "proxy.accumulation=lagged or weighting.normalize=false"
        )
    if (
        task.accumulation == "lagged"
        and task.training.on_nonfinite == "skip"
        and place.strategy.startswith("zero")
    ):
        raise UserError(
            f"training.on_nonfinite=skip: {place.strategy} has divided the gradients of the first "
            "micro-batches before the last one's loss is known; raise training.micro_batch_size so "
            "that one is enough, or use engine=fsdp2 or ddp"
        )


def has_dropout(model: LanguageModel) -> bool:
    """Whether two forwards of the model in training mode may differ: a dropout layer, or dropout
    inside attention."""
    config = model.inner.config
    attention = [
        getattr(config, name, 0.0) or 0.0
        for name in ("attention_dropout", "attn_pdrop", "attn_dropout")
    ]
    return any(attention) or any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
