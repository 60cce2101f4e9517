"""What headroom.json says, in sentences for the terminal, the plan and the report's page."""

import math
from collections.abc import Mapping
from typing import Any

from doremi_train.console import short
from doremi_train.methods.headroom import FARTHEST, Gain, SpeedUp

VERDICTS = {True: "worth a swarm", False: "not worth one", None: "cannot tell"}


def sentences(content: Mapping[str, Any]) -> list[str]:
    """How much can be gained, what that is worth in tokens, and whether a swarm pays."""
    gained = _gained(content, "natural")
    cost = f"a swarm's {content['swarm_runs']} runs cost {content['swarm_flops']:.2g} FLOPs"
    speed, verdict = content["speed_up"], VERDICTS[content["worth"]]
    if speed is None:
        return [
            gained,
            "what that is worth in tokens is not known: natural's score does not fall steadily "
            "with the tokens of its shorter runs",
            f"{verdict}: {cost}",
        ]
    low, high = (
        "any number of" if value is None else f"{value:.2g}" for value in content["saved_flops"]
    )
    return [
        gained,
        f"natural would need {_times(speed['mean'])} the tokens for that ({_times(speed['low'])} "
        f"to {_times(speed['high'])}), by its own learning curve",
        f"{verdict}: for a final run of {short(content['final_tokens'])} tokens that is {low} to "
        f"{high} FLOPs, and {cost}{_break_even(content)}",
    ]


def of_table(content: Mapping[str, Any]) -> list[str]:
    """The same of other people's runs, of which natural's learning curve is not known."""
    better = min(content["gains"], key=lambda name: float(content["gains"][name]["mean"]))
    gain, apart = content["gains"][better], content["apart"]
    over = content["natural"] if better == "natural" else better
    if content["worth"]:
        why = f"the gain over {over}, which costs nothing, is above 0 at both ends of its interval"
    elif content["worth"] is False:
        why = f"over {over}, which costs nothing, it gains {gain['high']:.4f} at most"
        why += "" if apart is None else f", and two runs on one mixture differ by up to {apart:.4f}"
    else:
        why = f"over {over}, which costs nothing, the interval leaves both open; more runs tell"
    return [
        _gained(content, content["natural"]),
        "what that is worth in tokens is not known: a table has no learning curve of natural, "
        "which stage=headroom trains where it has the data",
        f"{VERDICTS[content['worth']]}: {why}",
    ]


def _gained(content: Mapping[str, Any], natural: str) -> str:
    over, uniform = (_span(content["gains"][name]) for name in ("natural", "uniform"))
    return (
        f"on this objective the best mixture within caps gains {over} over {natural}, and "
        f"{uniform} over uniform{_unit(content)}, by a law fitted to {content['runs']} runs, whose "
        "optimum lies where no run is"
    )


def line(content: Mapping[str, Any]) -> str:
    """All of it in one line."""
    return f"headroom: {'; '.join(reversed(content['said']))}"


def offer(content: Mapping[str, Any]) -> str:
    """What the plan says before anything is known."""
    share = content["headroom_flops"] / content["swarm_flops"]
    return (
        f"the swarm's {content['swarm_runs']} runs cost {content['swarm_flops']:.2g} FLOPs; "
        f"stage=headroom tells with {content['headroom_runs']} runs ({share:.0%} of that; a swarm "
        "uses most of them again) what any mixture can gain, and whether it is worth it"
    )


def of_swarm(swarm: Mapping[str, Any]) -> str:
    """What a swarm's confirmation gained, from its fit.json, where no headroom was asked for."""
    realised = {one["name"]: one["realised"] for one in swarm["confirmed"]}
    first, best = swarm["confirmed"][0], realised[swarm["chosen"]]
    over = " and ".join(
        f"{realised[name] - best:+.4f} over {name}" for name in ("natural", "uniform")
    )
    low, high = (realised["natural"] - end for end in reversed(first["interval"]))
    return (
        f"gain: {swarm['chosen']} gained {over} in one small run each (of the proposal {low:.4f} "
        f"to {high:.4f} over natural was predicted); stage=headroom tells what that is worth in "
        "tokens"
    )


def _break_even(content: Mapping[str, Any]) -> str:
    """Tokens of a final run that a swarm pays for, where natural's curve says so."""
    speed = content["speed_up"]["mean"]
    if speed is None or speed <= 1:
        return ""
    saved = (speed - 1) * content["final_flops"] / content["final_tokens"]
    return f", which pays from about {short(content['swarm_flops'] / saved)} tokens on"


def _unit(content: Mapping[str, Any]) -> str:
    """The unit of a score, where it is no loss."""
    unit = content.get("unit")
    return "" if unit in (None, "nats per token") else f" ({unit})"


def ends(figures: Gain | SpeedUp) -> dict[str, float | None]:
    """A figure with the ends of its interval, as JSON can say it."""
    return {name: finite(value) for name, value in figures._asdict().items()}


def finite(value: float) -> float | None:
    """What JSON can say: null for what has no end."""
    return value if math.isfinite(value) else None


def _span(gain: Mapping[str, Any]) -> str:
    if gain["high"] is None:
        return f"{gain['mean']:.4f} (too few runs for an interval)"
    return f"{gain['mean']:.4f} ({gain['low']:.4f} to {gain['high']:.4f})"


def _times(speed: float | None) -> str:
    if speed is None or not math.isfinite(speed) or speed > FARTHEST:
        return f"more than {FARTHEST:g} times"
    return f"{speed:.2f} times"
