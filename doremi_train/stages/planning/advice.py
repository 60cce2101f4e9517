"""Which way to take: a sentence that follows from what is known of this data and budget before
anything runs. What it rests on is in docs/mixtures.md, "Which to take".
"""

from collections.abc import Mapping
from typing import NamedTuple

from doremi_train.console import short

# Part of a final run that small runs may take before they count. At 20 % (17 % of all FLOPs)
# doremi_steady was worse than uniform at equal FLOPs on both beds; at 5 %, on planted domains, the
# difference was not distinguishable from nothing.
LITTLE = 0.05
# Part of a final run that a swarm's small runs took where they earned it back on target text, with
# natural and uniform as many FLOPs (docs/measured.md).
EARNED = 0.96
# Times an even part. One of the planted domains has 3.5 times as much, and natural was poor there;
# of the eight of real text none has twice.
SKEWED = 3.0


class Known(NamedTuple):
    """What is known before anything runs."""

    way: str  # that is asked for
    # FLOPs of the small runs of each way, in units of the final run's; 0: it has none.
    shares: Mapping[str, float]
    tokens: int  # of the final run
    weights: Mapping[str, float]  # natural's, by domain
    passes: Mapping[str, float]  # of the final run over each domain, were it uniform
    most_passes: float  # mixture.max_epochs
    worth: bool | None = None  # what stage=headroom found of a swarm; None: it could not tell
    measured: bool = False  # whether stage=headroom was asked
    chosen: bool = False  # whether objective.metrics say what counts, and not all domains alike


def advise(known: Known) -> str:
    """The sentence, without a full stop."""
    if known.measured and known.worth:
        kept = " (as asked for)" if known.way == "swarm" else ""
        return f"advice: stage=headroom found a swarm worth its runs here: take mixture=swarm{kept}"
    if known.chosen and not known.measured:
        return f"advice: {_for_what_counts(known)}"
    share = known.shares.get(known.way, 0.0)
    if share == 0:
        return f"advice: {_without_small_runs(known)}"
    found = "stage=headroom found no swarm worth its runs here, and " if known.measured else ""
    if known.measured and known.worth is None:
        found = "stage=headroom could not tell whether a swarm is worth it, and "
    if share > LITTLE:
        needed = short(known.tokens * share / LITTLE)
        return (
            f"advice: {found}at this budget the small runs of {known.way} are {_percent(share)} of "
            f"the final run's FLOPs, and none that were measured earned so much back against "
            f"uniform: take mixture=odm, which has none, or mixture={_free(known)}{_why(known)}, "
            f"or raise main.tokens above {needed}, where they are {_percent(LITTLE)}"
        )
    return (
        f"advice: {found}at this budget the small runs of {known.way} are only {_percent(share)} "
        "of the final run's FLOPs and hardly count; whether its mixture is better than "
        f"{_free(known)}{_why(known)} say six seeds of stage=compare"
    )


def _for_what_counts(known: Known) -> str:
    share = known.shares["swarm"]
    said = (
        f"objective.metrics say what counts, and a swarm is what looks for it; its small runs are "
        f"{_percent(share)} of the final run's FLOPs here"
    )
    if share > EARNED:
        needed = short(known.tokens * share / EARNED)
        return (
            f"{said}, and no more than {_percent(EARNED)} were seen to be earned back: ask "
            f"stage=headroom first, or raise main.tokens above {needed}"
        )
    if _why(known):
        return (
            f"{said}; but with a scarce domain{_why(known)} a swarm was better than natural and "
            "unimax and not than uniform: ask stage=headroom first, and compare with "
            "mixture=uniform under a larger mixture.max_epochs"
        )
    kept = "keep to" if known.way == "swarm" else "take"
    return (
        f"{said}, and {_percent(EARNED)} were earned back on target text: {kept} mixture=swarm, as "
        "experiment=target does; stage=headroom tells with few runs what it can gain here"
    )


def _without_small_runs(known: Known) -> str:
    top = max(known.weights, key=lambda name: known.weights[name])
    times = known.weights[top] * len(known.weights)
    if known.way == "natural" and times > SKEWED:
        return (
            f"natural gives {_percent(known.weights[top])} of the tokens to {top}, {times:.2g} "
            "times an even part, and where one domain had so much natural was worse than uniform "
            f"and odm: take mixture={_free(known)}{_why(known)}, or odm, which cost nothing either"
        )
    doremi = known.shares.get("doremi", 0.0)
    if 0 < doremi <= LITTLE:
        return (
            f"{known.way} has no small runs; those of doremi would be only {_percent(doremi)} of "
            "the final run's FLOPs here, so that stage=compare with six seeds may find it better"
        )
    return (
        f"{known.way} has no small runs, and none that were measured earned back what they would "
        f"cost at this budget (of doremi {_percent(doremi)} of the final run's FLOPs): keep to "
        "ways without"
    )


def _free(known: Known) -> str:
    """The free mixture that weighs domains alike, as far as they may be repeated."""
    return "unimax" if max(known.passes.values()) > known.most_passes else "uniform"


def _why(known: Known) -> str:
    most = max(known.passes, key=lambda name: known.passes[name])
    if known.passes[most] <= known.most_passes:
        return ""
    return f" (uniform would pass {known.passes[most]:.3g} times over {most})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"
