"""The swarm alone: its runs, its fit, and weights.json."""

from doremi_train import mixture
from doremi_train.stages import Session
from doremi_train.stages import mixture as stages_mixture


def run(session: Session) -> mixture.Mixture:
    return stages_mixture.run(session)
