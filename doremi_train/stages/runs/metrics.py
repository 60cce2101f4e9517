"""What mixtures are judged by: the validation loss of every domain, and, where `objective.*` counts
it, the loss on the text of `target.*`.

K domains, M metrics (K, or K + 1), N target sequences of T tokens.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from doremi_train import files
from doremi_train.config import UserError, fingerprint
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation.statistics import listed
from doremi_train.methods import objective as objectives
from doremi_train.methods.box import Floats
from doremi_train.methods.objective import Objective
from doremi_train.model import folders
from doremi_train.parallel import comm
from doremi_train.stages.runs import targets
from doremi_train.stages.session import Session
from doremi_train.storage.runs import stop

TARGET = "target"  # the metric's name


class Losses(NamedTuple):
    """Losses of one model, to be added over processes that each fill in their own rows."""

    rows: Tensor  # (N, T) nats


def names(session: Session, store: TokenStore) -> list[str]:
    """(M,) of the metrics."""
    return [*store.domains, *([TARGET] if counts_target(session, store) else [])]


def objective(session: Session, store: TokenStore, natural: Floats) -> Objective:
    """The objective over metrics (M,), which have these values with natural. Raises UserError for a
    metric that there is not."""
    try:
        return objectives.objective(session.config.objective, names(session, store), natural)
    except KeyError as error:
        raise UserError(
            f"objective: unknown metric {error.args[0]!r}; there are {listed(store.domains)}, and "
            f"{TARGET}, which is the text of target.files or target.domains"
        ) from None
    except ValueError as error:
        raise UserError(f"objective.metrics: {error}; give one that counts") from None


def recipe(session: Session, store: TokenStore) -> dict[str, Any]:
    """What of the objective decides the result of a search; nothing where all domains count
    alike. Raises UserError for an objective that cannot be, before anything is trained."""
    asked = session.config.objective
    if asked == objectives.Options():
        return {}
    objective(session, store, np.ones(len(names(session, store))))
    plain = {"reduce": asked.reduce, "metrics": asked.metrics, "guard": asked.guard}
    return {"objective": plain | {TARGET: _text(session, store)[1]}}


def measured(
    session: Session, store: TokenStore, runs: Mapping[str, Path]
) -> dict[str, list[float]]:
    """(M,) of finished runs, by name, from their folders. A collective."""
    found = comm.on_first(
        lambda: {name: domain_losses(folder, store) for name, folder in runs.items()}
    )
    if not counts_target(session, store):
        return found
    return {
        name: [*losses, target_loss(session, store, runs[name] / "model")]
        for name, losses in found.items()
    }


def domain_losses(run: Path, store: TokenStore) -> list[float]:
    """(K,) validation loss of a finished run per domain, nats per token."""
    domains = files.read_json(run / "result.json")["evaluation"]["domains"]
    return [domains[name]["loss"] for name in store.domains]


def losses_on(session: Session, store: TokenStore, folder: Path, towards: Tensor) -> Tensor:
    """(N, T) losses of the model in a folder on sequences (N, T + 1), in float64 on the host; every
    process computes some of them."""
    training, world, device = session.config.training, comm.world(), session.place.device
    loaded = folders.load(folder, store.vocabulary_size, "model", training.precision)
    loaded.to(device).eval()
    rows = torch.zeros(len(towards), towards.shape[1] - 1, dtype=torch.float64, device=device)
    mine = torch.arange(world.rank, len(towards), world.size)
    with torch.no_grad():
        for some in mine.split(world.largest(training.batch_size, training.micro_batch_size)):
            stop.check("target")
            rows[some] = loaded(towards[some].to(device)).double()
    return comm.all_reduce_sum(Losses(rows))[0].rows.cpu()


def counts_target(session: Session, store: TokenStore) -> bool:
    """Whether the objective counts the target's text."""
    asked = session.config.objective
    counted = TARGET in (asked.metrics or {}) or TARGET in (asked.guard or {})
    if counted and TARGET in store.domains:
        raise UserError(
            f"objective: {TARGET} is a domain of the data, and the text of target.*; rename the "
            "domain"
        )
    return counted


def target_loss(session: Session, store: TokenStore, model: Path) -> float:
    """Mean loss of a model's folder on the target, nats per token; that of a run in the store is
    measured once, and kept there. A collective."""
    towards, text = _text(session, store)

    def look() -> tuple[Path | None, float | None]:
        run = model.parent.resolve()
        if run.parent != (session.store / "runs").resolve():
            return None, None
        known = session.store / "metrics" / f"{run.name}-{text}.json"
        return known, files.read_json(known)["loss"] if known.exists() else None

    known, loss = comm.on_first(look)
    if loss is None:
        loss = float(losses_on(session, store, model, towards).mean())
        if known is not None:
            comm.on_first(functools.partial(files.write_json, known, {"loss": loss}))
    return float(loss)


def _text(session: Session, store: TokenStore) -> tuple[Tensor, str | None]:
    """The target's sequences (N, T + 1), read once, and their fingerprint; None where they do not
    count."""
    if not counts_target(session, store):
        return torch.zeros(0, 0, dtype=torch.int64), None
    if __name__ not in session.results:
        towards = targets.of_mixtures(session, store)
        if not len(towards):
            raise UserError(
                f"objective: counts {TARGET}, and there is none; give target.files or "
                "target.domains"
            )
        session.results[__name__] = towards, fingerprint(towards.tolist())
    text: tuple[Tensor, str] = session.results[__name__]
    return text
