"""The seeds of a small run that learns domain weights: their names, as jobs side by side, and their
mean.

K domains.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.mixture import Mixture
from doremi_train.stages.runs import budget, submit
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run


def several(session: Session) -> bool:
    """Whether `proxy/` is a folder of runs, round-1/seed-0 and so on, or the one run itself."""
    return session.config.proxy.rounds > 1 or session.config.proxy.seeds > 1


def name_of(session: Session, number: int, index: int) -> str:
    """Name under run_dir of the run of seed `index` in round `number`, from 1."""
    return f"proxy/round-{number}/seed-{index}" if several(session) else "proxy"


def apart(session: Session) -> bool:
    """Whether the seeds of a round are jobs of their own."""
    return session.config.submit.cluster != "none" and session.config.proxy.seeds > 1


def submitted(session: Session, runs: Sequence[Run], number: int, **changes: Any) -> None:
    """The runs of a round that are not finished as jobs side by side: each the proxy stage with
    that one seed, and with these changes to the configuration."""
    children = {}
    for index, run in enumerate(runs):
        if not run.finished:
            children[f"proxy/round-{number}/seed-{index}"] = submit.configured(
                session,
                session.run_dir / f"proxy/round-{number}/jobs/seed-{index}",
                stage="proxy",
                seed=budget.proxy_seed(session, index),
                **{"proxy.seeds": 1, "proxy.rounds": 1} | changes,
            )
    submit.submit(session, children)


@contextlib.contextmanager
def reporting(session: Session) -> Iterator[None]:
    """Keep the status of `proxy/` where it is a folder of runs."""
    with session.reporting(session.run_dir / "proxy") if several(session) else nullcontext():
        yield


def average(run: Run, store: TokenStore) -> Tensor:
    """ᾱ (K,) of a finished run."""
    return torch.from_numpy(store.vector(run.result()["weights"]))


def mixture(
    session: Session,
    store: TokenStore,
    method: str,
    mean: Tensor,
    interval: tuple[Tensor, Tensor] | None,
    rounds: int = 1,
) -> Mixture:
    """The mean (K,) over seeds, with its interval where there are several."""
    low_high = None
    if interval is not None:
        low, high = map(store.named, interval)
        low_high = {name: (low[name], high[name]) for name in store.domains}
    return Mixture(
        method=method,
        weights=store.named(mean),
        interval=low_high,
        provenance={"proxy_seeds": session.config.proxy.seeds, "rounds": rounds},
    )
