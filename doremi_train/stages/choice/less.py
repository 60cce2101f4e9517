"""LESS (`methods.less`), step by step: a warm-up, what its checkpoints say of every example, and a
choice.

    warm-up      a part of the pool is trained on for a few epochs; each leaves parameters and
                 AdamW's state
    scoring      cosines of every example's AdamW direction with the targets' gradients, at each
                 checkpoint: exactly, or by projected features that are kept, so that later targets
                 cost nothing but their own gradients
    choice       the examples of the highest influence, beside those of the baselines
    fine-tuning  stage=finetune with the same keys trains on a choice

Each is done once in a store, whoever asks; any number of processes and commands on one store score
the pool together. The pool is the training split of data.*, read as stage=finetune reads it. With
`selection.scorer_model` another model warms up and scores; a choice is lines of files, so any model
may be trained on it.

N examples of the pool, S subtasks of all targets together.
"""

import functools
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train import files
from doremi_train.config import UserError, fingerprint
from doremi_train.console import Bar
from doremi_train.data.chat import Encoder
from doremi_train.data.corpus.sources import resolve, signature
from doremi_train.data.instructions import Instructions
from doremi_train.methods import less
from doremi_train.parallel import comm
from doremi_train.reports import less_page
from doremi_train.selection.examples import influence
from doremi_train.selection.examples.influence import Checkpoint
from doremi_train.selection.examples.rows import Rows, cosines
from doremi_train.stages.choice import less_choice, less_pool, tuning, warmup
from doremi_train.stages.choice.less_pool import Pool, Subtask
from doremi_train.stages.choice.warmup import Warm
from doremi_train.stages.session import Session, once
from doremi_train.storage.runs import Run, stop

SCORES = 1  # raise when the same request would give other scores
_SHARD = 512  # examples scored by one process at a time


def run(session: Session) -> Path:
    """The folder of the choices."""
    scorer = _scorer(session)
    data = pool(session)
    candidates = less_pool.gather(session, data)
    targeted = session.config.selection.targets
    served = less_pool.serving(session, _encoder(session)) if targeted else {}
    warm = warmup.run(scorer, data)
    choice = Run(session.store, "selection", _recipe(session, warm, served))
    if not choice.finished:
        scores = _influences(scorer, warm, candidates, served)
    if not served:
        session.say(
            "select                 the features are in the store; give selection.targets to "
            "choose by them"
        )
        return session.store
    with session.computing(choice, "select", quiet=True) as todo:
        if todo:
            comm.on_first(
                lambda: choice.finish(
                    less_choice.choose(scorer, choice.folder, candidates, served, scores)
                )
            )
    return choice.folder


@once
def pool(session: Session) -> Instructions:
    """The examples to choose from, tokenised for the model that scores them, with their records."""
    return tuning.prepared(_scorer(session), _encoder(session), keep_records=True)


@once
def _encoder(session: Session) -> Encoder:
    key = "selection.scorer_model" if session.config.selection.scorer_model else "finetune.model"
    return Encoder(str(_scorer(session).config.finetune.model), key)


def show(session: Session, folder: Path) -> None:
    """A page and a summary of a choice; features that are kept for later targets have none."""
    if not session.config.selection.targets:
        return
    result = comm.on_first(lambda: files.read_json(folder / "result.json"))
    session.say(*less_choice.summary(result, folder))
    comm.on_first(lambda: less_page.write(session.run_dir / "report.html", result))


def _scorer(session: Session) -> Session:
    """The same with the model that warms up and scores in the place of the one that is trained in
    the end."""
    options, tuned = session.config.selection, session.config.finetune
    folder = options.scorer_model or tuned.model
    if folder is None:
        raise UserError(
            "finetune.model: missing; give the local transformers folder that is to be fine-tuned"
        )
    if session.config.training.optimizer != "adamw":
        raise UserError(
            f"training.optimizer={session.config.training.optimizer}: selection=less follows "
            "AdamW's steps; take adamw"
        )
    return replace(session, config=replace(session.config, finetune=replace(tuned, model=folder)))


# ── Scoring ─────────────────────────────────────────────────────────────────────────


def _influences(
    session: Session, warm: Warm, pool: Pool, served: Mapping[Subtask, Any]
) -> NDArray[np.float64]:
    """(N, S), computed by all processes together."""
    options = session.config.selection.less
    numbers = asdict(less.Options(options.epsilon, options.bias_correction, options.cosine))
    recipe = {"scores": SCORES, "warmup": warm.address, "direction": numbers}
    kind = options.features or (None if served else "int8")
    if kind is not None:
        del numbers["cosine"]  # which is the targets' business
        recipe |= {"dimension": options.dimension, "seed": options.projection_seed}
    else:
        recipe |= {"targets": less_pool.printed(served)}
    home, epochs = session.store / "selection" / f"less-{fingerprint(recipe)}", len(warm.rates)
    count, world, per_epoch = len(pool.tokens), comm.world(), []
    with Bar("select: scoring", epochs * count, unit="examples", show=world.first) as bar:
        for epoch in range(1, epochs + 1):
            scored = _Scored(session, warm, epoch, pool, served)
            work, width = (
                (scored.features, options.dimension) if kind else (scored.cosines, len(served))
            )
            folder = home / f"epoch-{epoch}"
            rows = Rows(folder, recipe | {"epoch": epoch}, count, width, kind or "float64", _SHARD)
            rows.fill(
                work,
                world.rank * rows.shards // world.size,
                partial(_look, bar, (epoch - 1) * count),
            )
            if served:
                shards = (rows.read(number) for number in range(rows.shards))
                per_epoch += [
                    np.concatenate(
                        [cosines(s, scored.target_features) if kind else s for s in shards]
                    )
                ]
    if not per_epoch:
        return np.zeros((count, 0))
    return less.influence(torch.from_numpy(np.stack(per_epoch)), torch.tensor(warm.rates)).numpy()


def _look(bar: Bar, before: int, done: int) -> None:
    stop.check("select")
    bar.update(before + done)


class _Scored:
    """What one checkpoint says; it is loaded when it is first asked."""

    def __init__(
        self, session: Session, warm: Warm, epoch: int, pool: Pool, served: Mapping[Subtask, Any]
    ) -> None:
        self._session, self._warm, self._epoch, self._pool, self._served = (
            session,
            warm,
            epoch,
            pool,
            served,
        )
        self._options, self._device = session.config.selection.less, session.place.device

    def cosines(self, rows: slice) -> NDArray[np.floating]:
        return self._each(
            rows, lambda batch: influence.cosines(self._at, batch, self._targets, self._options)
        )

    def features(self, rows: slice) -> NDArray[np.floating]:
        size, seed = self._options.dimension, self._options.projection_seed
        return self._each(
            rows, lambda batch: influence.features(self._at, batch, size, seed, self._options)
        )

    @functools.cached_property
    def target_features(self) -> NDArray[np.floating]:
        """(S, k) of lengths that are right on average."""
        size, seed = self._options.dimension, self._options.projection_seed
        return (
            torch.stack([influence.feature(target, size, seed) for target in self._targets])
            .cpu()
            .numpy()
        )

    @functools.cached_property
    def _at(self) -> Checkpoint:
        return self._warm.load(self._epoch)

    @functools.cached_property
    def _targets(self) -> list[dict[str, Tensor]]:
        targets = []
        for subtask in self._served.values():
            tokens = [tokens for tokens, _ in subtask]
            together = influence.batches(
                tokens, less_pool.tokens_at_once(self._session), self._device
            )
            targets.append(
                influence.target(self._at.model, (batch for _, batch in together), self._options)
            )
        return targets

    def _each(self, rows: slice, work: Any) -> NDArray[np.floating]:
        examples = self._pool.tokens[rows]
        computed: list[Any] = [None] * len(examples)
        for numbers, batch in influence.batches(
            examples, less_pool.tokens_at_once(self._session), self._device
        ):
            for number, row in zip(numbers, work(batch).cpu().numpy(), strict=True):
                computed[number] = row
        return np.stack(computed)


# ── Choice ──────────────────────────────────────────────────────────────────────────


def _recipe(session: Session, warm: Warm, served: Mapping[Subtask, Any]) -> dict[str, Any]:
    """Everything that decides the choice."""
    options = session.config.selection
    settings = {
        key: value
        for key, value in asdict(options.less).items()
        if key not in ("train_on", "test", "batch_tokens")
    }
    return {
        "scores": SCORES,
        "warmup": warm.address,
        "less": settings,
        "budget": list(options.budget),
        "files": signature(session.config.data, resolve(session.config.data)),
        "targets": less_pool.printed(served),
        "seed": session.config.seed,
    }
