"""Whether the way to a mixture follows the objective, or what is its own nature: then the command
says so, in one line."""

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import objective
from doremi_train.stages.runs import metrics, targets
from doremi_train.stages.session import Session

_AIMED = ("doge", "mixmin")  # look at a target
# Of the others swarms and searches follow any objective, and what is given none.
_NATURE = {
    "doremi": "the excess loss over the reference, of all domains alike",
    "ado": "what the main run still learns of every domain",
    "odm": "the training losses of all domains",
    "dro": "the distance of every domain from its target loss",
}


def unfollowed(session: Session, store: TokenStore) -> str | None:
    """What the way follows instead of the objective; None where that is what it follows. Raises
    UserError for an objective that cannot be."""
    asked, method = session.config.objective, session.method
    if asked != objective.Options():
        metrics.recipe(session, store)
    if method in _AIMED:
        followed = _followed(session, store)
    else:
        followed = method not in _NATURE or asked == objective.Options()
    if followed:
        return None
    more = "" if asked.guard is None or method in _NATURE else ", and keeps no guard"
    return (
        f"mixture={method} follows {_NATURE.get(method) or _towards(session, store)}{more}; it is "
        f"judged by the objective, which is {_said(session, store)}. Mixtures for any objective "
        "are those of mixture=swarm and mixture=search"
    )


def _followed(session: Session, store: TokenStore) -> bool:
    """Whether a way that looks at a target looks at what the objective counts."""
    asked = session.config.objective
    if asked.reduce != "mean" or asked.guard is not None or asked.standardise:
        return False
    if targets.given(session):
        return metrics.weights(session, store).keys() == {metrics.TARGET}
    return asked == objective.Options() or bool(targets.weighed(session, store))


def _towards(session: Session, store: TokenStore) -> str:
    if targets.given(session):
        return "the text of target.*"
    if targets.weighed(session, store):
        return "the domains that objective.metrics weighs"
    return "all domains alike"


def _said(session: Session, store: TokenStore) -> str:
    """The objective in words."""
    asked, weights = session.config.objective, metrics.weights(session, store)
    reduced = "the largest" if asked.reduce == "worst" else "the mean"
    whole = list(weights) == list(store.domains) and len({*weights.values()}) == 1
    of = "domains" if whole else ", ".join(f"{name} × {w:g}" for name, w in weights.items())
    guarded = f", with guards on {', '.join(asked.guard)}" if asked.guard else ""
    return f"{reduced} of {of}{', standardised' if asked.standardise else ''}{guarded}"
