"""Which candidates a step trains on: GREATS, and the policies that it has to beat.

A step draws N candidates, and k = training.batch_size of them are trained on. Where one forward
holds all candidates of a process, the step is one pass: a forward, a backward for activations
alone, the pick, and the picks' gradient from the stored factors. Otherwise (several micro-batches,
activation checkpointing) the candidates are scored a micro-batch at a time, and the picks are a
second, ordinary pass. Policies that need no gradient always take this way.

What processes exchange is a row of numbers a candidate; everyone then picks the same.

N candidates, n of them on this process, k picks, T tokens a sequence, M validation sequences, R
numbers of a sketch.
"""

from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from pydantic.dataclasses import dataclass
from torch import Tensor

from doremi_train.config import STRICT, Positive, UserError, fingerprint
from doremi_train.methods import greats
from doremi_train.parallel import comm

GRADIENT = ("greats", "topk", "grad_norm")  # policies that need one
KEPT = (
    1 << 26
)  # numbers of per-example gradients that the exact route keeps until the pick, 256 MB in float32


@dataclass(frozen=True, config=STRICT)
class BatchSelectionOptions(greats.Options):
    method: Literal["none", "greats", "topk", "max_loss", "grad_norm", "random"] = "none"
    candidates: Positive | None = None  # N of a step; null: twice training.batch_size
    route: Literal["sketch", "exact"] = "sketch"  # of inner products
    sketch: Positive = 16  # numbers a side: a matrix becomes 16 × 16
    preconditioned: bool = True  # score the step that AdamW would take, not the gradient's
    validation: tuple[str, ...] | None = (
        None  # files of the target; null: drawn from the validation split
    )
    domains: tuple[str, ...] | None = None  # it is drawn from these; null: all
    validation_sequences: Positive = 16  # M
    validation_every: Positive = (
        10  # steps between gradients of the validation loss; the first so many take one each
    )
    curvature_every: Positive = 100  # steps between measurements of λ
    verify: bool = False  # check the identities of per-example gradients at every step; slow


class Setting(NamedTuple):
    """What a run selects by."""

    options: BatchSelectionOptions
    candidates: int  # N
    validation: Tensor  # (M, T + 1) tokens that scores look at


def described(setting: Setting | None) -> dict[str, Any]:
    """What a selection adds to the recipe of a run; nothing where there is none."""
    if setting is None:
        return {}
    free = ("validation", "verify")  # where the target is, not what
    options = {key: value for key, value in asdict(setting.options).items() if key not in free}
    shown = {
        "candidates": setting.candidates,
        "validation": fingerprint(setting.validation.tolist()),
    }
    return {"batch_selection": options | shown}


def check(setting: Setting, count: int, parts: int, strategy: str, compiled: bool) -> None:
    """Raise UserError where `count` picks cannot be made as the options say, under this engine and
    in so many micro-batches of a process."""
    options = setting.options
    if setting.candidates <= count:
        raise UserError(
            f"batch_selection.candidates={setting.candidates}: must be more than "
            f"training.batch_size={count}, the number of picks"
        )
    if options.method == "random":
        return
    if strategy not in ("single", "ddp") or compiled:
        raise UserError(
            f"batch_selection={options.method}: scores candidates layer by layer on whole, "
            "uncompiled models; use engine=ddp without engine.compile"
        )
    if (
        options.method == "greats"
        and options.route == "exact"
        and (parts > 1 or comm.world().size > 1)
    ):
        raise UserError(
            "batch_selection.route=exact: needs all candidates in one micro-batch of one process; "
            "use batch_selection.route=sketch, or raise training.micro_batch_size"
        )


class Effort(NamedTuple):
    """What a step costs, in ordinary ones on as many sequences as are picked."""

    learn: float  # forwards with their backward
    look: float  # forwards alone


def effort(
    options: BatchSelectionOptions, candidates: int, count: int, validation: int, one_pass: bool
) -> Effort:
    """Of picking `count` of the candidates by `validation` sequences (0: it looks at none), once the first steps are
    done. A backward for activations alone, and the weights' part of one, are half a backward each; exact inner products
    of all candidates are as much as their weights' part, and sketches are not counted; nor that the picks' part is
    almost free where exact gradients are kept (`KEPT`)."""
    share = candidates / count
    if options.method == "random":
        return Effort(1.0, 0.0)
    if options.method == "max_loss":
        return Effort(1.0, share)
    half = 0.5 * share
    exactly = half if options.route == "exact" else 0.0
    learn, look = (
        (half + exactly + 0.5, half - exactly - 0.5)
        if one_pass
        else (half + exactly + 1.0, half - exactly)
    )
    if options.method in ("greats", "topk"):
        learn += validation / count / options.validation_every
    if options.method == "greats" and options.curvature == "calibrated":
        learn += 2 * validation / count / options.curvature_every
    return Effort(learn, look)


def looks_ahead(step: int, every: int) -> bool:
    """Whether step number `step` (from 1) takes the validation gradient anew. In the beginning it
    turns fastest: one gradient for the first ten steps lost all that picking gains there
    (`benchmarks.policies`)."""
    return step <= every or (step - 1) % every == 0
