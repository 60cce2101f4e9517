"""The proxy: Group DRO against the reference, for every round and seed, averaged into weights.json.

With mixture=doge it is DoGE's run instead.
"""

import contextlib

from doremi_train import mixture
from doremi_train.stages.mixtures import doge, doremi, seeds
from doremi_train.stages.session import Session, once


@once
def run(session: Session) -> mixture.Mixture:
    """Reference and proxy, round after round, until the mixture stays where it was."""
    train = doge.run if session.config.mixture.method == "doge" else doremi.rounds
    with (
        session.reporting(session.run_dir / "proxy")
        if seeds.several(session)
        else contextlib.nullcontext()
    ):
        return train(session)
