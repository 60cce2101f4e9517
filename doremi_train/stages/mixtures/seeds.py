"""The seeds of a small run that learns domain weights: their names, as jobs side by side, and their
mean.

K domains.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from doremi_train import mixture as doremi_train_mixture
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.stages.runs import budget, submit
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run


def several(session: Session) -> bool:
    """Whether `proxy/` is a folder of runs, round-1/seed-0 and so on, or the one run itself."""
    return session.config.proxy.rounds > 1 or session.config.proxy.seeds > 1


def name_of(session: Session, number: int, index: int) -> str:
    """Under run_dir, of the run of seed `index` in round `number`, from 1."""
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


def average(run: Run, store: TokenStore) -> Tensor:
    """ᾱ (K,) of a finished run."""
    found = run.result()["weights"]
    return torch.tensor([found[name] for name in store.domains], dtype=torch.float64)


def mixture(
    session: Session,
    store: TokenStore,
    mean: Tensor,
    interval: tuple[Tensor, Tensor] | None,
    rounds: int = 1,
) -> doremi_train_mixture.Mixture:
    """Of the mean (K,) over seeds, and its interval where there are several."""
    low_high = None
    if interval is not None:
        pairs = zip(store.domains, interval[0].tolist(), interval[1].tolist(), strict=True)
        low_high = {name: (low, high) for name, low, high in pairs}
    return doremi_train_mixture.Mixture(
        method=session.config.mixture.method,
        weights=dict(zip(store.domains, mean.tolist(), strict=True)),
        interval=low_high,
        provenance={"proxy_seeds": session.config.proxy.seeds, "rounds": rounds},
    )
