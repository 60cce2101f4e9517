"""The swarm alone: its runs, its fit, and weights.json."""

from doremi_train import weights
from doremi_train.stages import Session, mixture


def run(session: Session) -> weights.Mixture:
    return mixture.run(session)
