"""The reference model p_ref: ordinary training on α_ref, or a model that exists already."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from doremi_train.console import Bar
from doremi_train.data.batches import read
from doremi_train.data.sampler import Ints
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.model import folders
from doremi_train.parallel import comm
from doremi_train.stages import prepare
from doremi_train.stages.mixtures import WAYS, doremi
from doremi_train.stages.runs import reference, reference_losses
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Preempted, stop
from doremi_train.training import frozen

_AT_ONCE = 1 << 20  # draws, so that their numbers take little memory


def run(session: Session) -> Path:
    """The folder of the reference of the first round; where its losses are cached, those that
    proxies need too."""
    store = prepare.run(session)
    trained = reference.folder(session, store, reference.mixture(session, store), "reference")
    if WAYS[session.method] is doremi and reference_losses.cached(session):
        with session.reporting(session.run_dir / "reference"):
            fill(session, store, trained)
    return trained


class Done(NamedTuple):
    """Sums over processes."""

    computed: Tensor  # () sequences


def fill(session: Session, store: TokenStore, folder: Path) -> None:
    """Compute what the proxies of all seeds draw in the first round, as far as it is not there.

    Raises Preempted when told to stop: what was computed is kept.
    """
    if session.config.proxy.objective == "resample":
        session.say(
            "reference losses       not computed ahead: with proxy.objective=resample the draws "
            "follow α"
        )
        return
    table = frozen.Table(
        session.store,
        store,
        reference_losses.recipe_of(session, store, folders.folder_fingerprint(folder)),
    )
    rows, world = _drawn(session, store, table), comm.world()
    training, device = session.config.training, session.place.device
    batch = (
        reference_losses.LARGER
        * world.largest(training.batch_size, training.micro_batch_size)
        * world.size
    )
    live: frozen.Live | None = None
    divided = reference_losses.divided(session)  # then all compute where any has to
    total = 0
    with Bar("reference losses", len(rows) * table.length, show=world.first) as bar:
        for at in range(0, len(rows), batch):
            mine = rows[at : at + batch][world.rank :: world.size]
            mine = mine[~frozen.there(table.read(mine))]
            if comm.any_of(len(mine) > 0) if divided else len(mine):
                live = live or reference_losses.live(session, store, folder)
                losses = frozen.rounded(
                    live.losses(read(store, "train", *table.sequences(mine), table.length))
                )
                sound = np.isfinite(losses).all(1)
                table.write(mine[sound], losses[sound])
            computed = torch.tensor(float(len(mine)), dtype=torch.float64, device=device)
            # None runs ahead, and all stop at once.
            done, stopping = comm.all_reduce_sum(Done(computed), stop.requested)
            total += int(done.computed)
            bar.update(min(at + batch, len(rows)) * table.length, f"{total} computed")
            if stopping:
                raise Preempted("reference losses: told to stop; the same command continues")
    session.say(
        f"reference losses       {len(rows)} sequences in {table.path.parent}, {total} of them "
        "computed now"
    )


def _drawn(session: Session, store: TokenStore, table: frozen.Table) -> Ints:
    """Rows that the proxies of all seeds draw, each once, in the order of the file."""
    wanted = np.zeros(len(table), dtype=bool)
    for index in range(session.config.proxy.seeds):
        drawing = reference_losses.sampler(session, store, index)
        for domain, count in enumerate(
            np.minimum(reference_losses.draws(session, drawing), drawing.sizes).tolist()
        ):
            for number in _pieces(count):
                which = np.full(len(number), domain)
                wanted[table.rows(which, drawing.sequence(which, number))] = True
    return np.flatnonzero(wanted)


def _pieces(count: int) -> Iterator[Ints]:
    for start in range(0, count, _AT_ONCE):
        yield np.arange(start, min(start + _AT_ONCE, count))
