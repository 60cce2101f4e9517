"""The proxies alone: those of the mixture's way, or DoReMi's where it has none."""

from doremi_train.mixture import Mixture
from doremi_train.stages.mixtures import WAYS, doge, doremi
from doremi_train.stages.session import Session


def run(session: Session) -> Mixture:
    """Train them, round after round and seed after seed; what they say is returned, not written."""
    return (doge if WAYS[session.method] is doge else doremi).run(session)
