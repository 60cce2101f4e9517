"""What a saved model makes of given text: measured once for a run in the store, and kept there.

N sequences of T tokens.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from doremi_train import files
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import folders
from doremi_train.parallel import comm, engine
from doremi_train.stages.session import Session
from doremi_train.storage import seal
from doremi_train.storage.runs import stop


class Losses(NamedTuple):
    """Losses of one model, to be added over processes that each fill in their own rows."""

    rows: Tensor  # (N, T) nats


def losses_on(session: Session, store: TokenStore, folder: Path, towards: Tensor) -> Tensor:
    """(N, T) losses of the model in a folder on sequences (N, T + 1), in float64 on the host; every
    process computes some of them."""
    training, world, device = session.config.training, comm.world(), session.place.device
    loaded = folders.load(folder, store.vocabulary_size, "model", training.precision)
    loaded = engine.frozen(session.place, loaded)
    rows = torch.zeros(len(towards), towards.shape[1] - 1, dtype=torch.float64, device=device)
    # All make as many calls, each a collective where the model is divided: who has one sequence
    # less computes its neighbour's, which is left out.
    mine = torch.arange(world.rank, len(towards) + world.rank, world.size)
    with torch.no_grad():
        for some in mine.split(world.largest(training.batch_size, training.micro_batch_size)):
            stop.check("target")
            found = loaded(towards[some.clamp_max(len(towards) - 1)].to(device)).double()
            own = some < len(towards)
            rows[some[own]] = found[own]
    return comm.all_reduce_sum(Losses(rows))[0].rows.cpu()


def run_of(session: Session, model: Path) -> str | None:
    """The address of the run in the store whose model this is; None for a model from elsewhere."""
    run = model.parent.resolve()
    return run.name if run.parent == (session.store / "runs").resolve() else None


def kept(session: Session, model: Path, text: str) -> dict[str, float] | None:
    """What was measured of a model on the text of this fingerprint; None where nothing was. For any
    process alone."""
    run = run_of(session, model)
    place = None if run is None else _place(session, run, text)
    if place is None or not place.exists():
        return None
    with contextlib.suppress(ValueError, AttributeError, TypeError):  # it is no JSON, or no object
        figures: dict[str, float] = files.read_json(place)
        if figures.pop(_CHECK, None) in (None, _digest(figures)):  # older versions had none
            return figures
    return None


def known(session: Session, model: Path, texts: Sequence[str]) -> list[dict[str, float] | None]:
    """The same of several texts. A collective."""
    return comm.on_first(lambda: [kept(session, model, text) for text in texts])


def keep(session: Session, model: Path, measured: Mapping[str, dict[str, Any]]) -> None:
    """Keep what was measured of a model, by the fingerprint of the text. A collective."""

    def write() -> None:
        run = run_of(session, model)
        if run is None or not measured:
            return
        files.clear_dead(session.store / "metrics")
        for text, figures in measured.items():
            files.write_json(_place(session, run, text), {**figures, _CHECK: _digest(figures)})

    comm.on_first(write)


_CHECK = "sha256"  # of the figures beside it


def _digest(figures: Mapping[str, Any]) -> str:
    return seal.of_content(files.as_json(figures))["sha256"]


def _place(session: Session, run: str, text: str) -> Path:
    return session.store / "metrics" / f"{run}-{text}.json"
