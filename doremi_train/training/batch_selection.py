"""Selection of the candidates that a step trains on: GREATS, and the policies that it has to beat.

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
# Numbers of per-example gradients that the exact route keeps until the pick, 256 MB in float32.
KEPT = 1 << 26


@dataclass(frozen=True, config=STRICT)
class BatchSelectionOptions(greats.Options):
    method: Literal["none", "greats", "topk", "max_loss", "grad_norm", "random"] = "none"
    """How picks are made of a step's candidates; none: every sequence that is drawn is trained on.
    """

    candidates: Positive | None = None
    """Sequences N drawn a step, of which training.batch_size are picked; null: twice as many."""

    route: Literal["sketch", "exact"] = "sketch"
    """How inner products of gradients are computed."""

    sketch: Positive = 16
    """Numbers a side that a matrix's gradient is projected to."""

    preconditioned: bool = True
    """Whether the step of AdamW is scored instead of the gradient's."""

    validation: tuple[str, ...] | None = None
    """Files of the target text; null: drawn from the validation split, apart from what is
    evaluated."""

    domains: tuple[str, ...] | None = None
    """Domains that the target text is drawn from; null: all."""

    validation_sequences: Positive = 16
    """Sequences M of the target text."""

    validation_every: Positive = 10
    """Steps between gradients of the target's loss; the first so many steps take one each."""

    curvature_every: Positive = 100
    """Steps between measurements of the curvature."""

    verify: bool = False
    """Whether the identities of per-example gradients are checked at every step, which is slow."""


class Setting(NamedTuple):
    """Options of a run's selection, and the sequences that it looks at."""

    options: BatchSelectionOptions
    candidates: int  # N
    validation: Tensor  # (M, T + 1) tokens that scores look at


def described(setting: Setting | None) -> dict[str, Any]:
    """Part of the recipe of a run that a selection adds; nothing where there is none."""
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
    """Cost of a step, in ordinary ones on as many sequences as are picked."""

    learn: float  # forwards with their backward
    look: float  # forwards alone


def effort(
    options: BatchSelectionOptions, candidates: int, count: int, validation: int, one_pass: bool
) -> Effort:
    """Cost of picking `count` of the candidates by `validation` sequences (0: it looks at
    none), once the first steps are done.

    A backward for activations alone, and the weights' part of one, are half a backward each; exact
    inner products of all candidates are as much as their weights' part, and sketches are not
    counted; nor that the picks' part is almost free where exact gradients are kept (`KEPT`).
    """
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
