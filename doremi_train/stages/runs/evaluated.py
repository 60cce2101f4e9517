"""Losses of a saved model on validation text, and on text that it was trained on: what its trainer
measured at its end, what was measured since, or else measured now, on all processes, divided among
them as the engine divides.
"""

from pathlib import Path
from typing import Any

import numpy as np

from doremi_train import files
from doremi_train.config import fingerprint
from doremi_train.data.sampler import Ints, Sampler
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import losses
from doremi_train.methods import simplex
from doremi_train.model import folders
from doremi_train.parallel import comm, engine
from doremi_train.stages.runs import budget, measuring
from doremi_train.stages.session import Session


def figures(
    session: Session, store: TokenStore, model: Path, training_too: bool = False
) -> dict[str, Any]:
    """The entry of evaluation.json for the model in a folder; no model is loaded where all of it is
    known. A collective.

    `training_too`: also the loss on training sequences, which is far below where a domain is known
    by heart.
    """
    weights = comm.on_first(lambda: folders.folder_fingerprint(model))
    splits = ["validation", *["train"] * training_too]
    texts = {split: fingerprint(_what(session, store, split, weights)) for split in splits}
    known = measuring.known(session, model, [*texts.values()])
    of: dict[str, Any] = dict(zip(splits, known, strict=True))
    if of["validation"] is None:
        of["validation"] = comm.on_first(lambda: _by_trainer(session, store, model, weights))
    left = [split for split in splits if of[split] is None]
    now = _measure(session, store, model, left) if left else {}
    measuring.keep(session, model, {texts[split]: found for split, found in now.items()})
    of |= now
    if not training_too:
        return dict(of["validation"])
    seen = {name: entry["loss"] for name, entry in of["train"]["domains"].items()}
    return of["validation"] | {"training_loss": seen}


def _what(session: Session, store: TokenStore, split: str, weights: str) -> dict[str, Any]:
    """All that decides what is measured."""
    training = session.config.training
    return {
        "weights": weights,
        "data": store.fingerprint,
        "split": split,
        "sequences": session.config.evaluation.sequences,
        "length": training.sequence_length,
        "precision": training.precision,
    } | (
        {"seed": session.config.seed, **budget.described(budget.subsample(session))}
        if split == "train"
        else {}
    )


def _by_trainer(
    session: Session, store: TokenStore, model: Path, weights: str
) -> dict[str, Any] | None:
    """What a run in the store measured at its end; None where it does not say of which weights that
    is (a version before this one), or they are others by now, or it was another evaluation."""
    folder = model.parent
    if measuring.run_of(session, model) is None or not (folder / "result.json").exists():
        return None
    result, recipe = (files.read_json(folder / f"{name}.json") for name in ("result", "recipe"))
    trained, asked = recipe.get("training", {}), recipe.get("evaluation", {})
    its = {
        "weights": result.get("model"),
        "data": recipe.get("data"),
        "split": "validation",
        "sequences": asked.get("sequences"),
        "length": trained.get("sequence_length"),
        "precision": trained.get("precision"),
    }
    same = its == _what(session, store, "validation", weights)
    found: dict[str, Any] | None = result["evaluation"] if same else None
    return found


def _measure(
    session: Session, store: TokenStore, model: Path, splits: list[str]
) -> dict[str, dict[str, Any]]:
    """What the model makes of each split, now."""
    training, device = session.config.training, session.place.device
    loaded = folders.load(model, store.vocabulary_size, "model", training.precision)
    loaded = engine.frozen(session.place, loaded)
    batch = comm.world().largest(training.batch_size, training.micro_batch_size)
    return {
        split: losses.measure(
            loaded,
            store,
            training.sequence_length,
            batch,
            session.config.evaluation,
            device,
            _trained_on(session, store) if split == "train" else None,
        )
        for split in splits
    }


def _trained_on(session: Session, store: TokenStore) -> tuple[Ints, Ints]:
    """Domain (N,) and sequence (N,): those of every domain that the reference drew first, as many
    as are evaluated."""
    whole = store.sequences("train", session.config.training.sequence_length)
    batch = len(whole) * session.config.evaluation.sequences
    sampler = Sampler(whole, store.domains, batch, session.config.seed, budget.subsample(session))
    first = sampler.draw(0, simplex.uniform(len(whole)).numpy(), np.zeros_like(whole))
    return first.domain, first.sequence
