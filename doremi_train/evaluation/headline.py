"""What the paper begins with: in how many steps the learned mixture reaches what natural reaches at
its end; beside it the mean and the worst domain, and what the small runs cost.

An interval is a 95 % Student-t interval over seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from doremi_train.evaluation.results import NATS, Result, Setting
from doremi_train.evaluation.statistics import student_t


class Goal(NamedTuple):
    """Whose final loss is to be reached."""

    name: str  # in evaluation.json
    label: str


def goal(setting: Setting) -> Goal | None:
    """Natural, or α_ref where natural was not trained; None where the mixture is that one, or
    neither is there."""
    for name in ("natural", "baseline"):
        if all(name in run.figures for run in setting.results):
            used = str(setting.results[0].config.get("reference.mixture", "natural"))
            label = "natural" if name == "natural" else used
            return None if setting.losses(name) == setting.losses("main") else Goal(name, label)
    return None


def headline(setting: Setting) -> str:
    """Two or three sentences; "" where there is nothing to be held against."""
    against = goal(setting)
    if against is None:
        return ""
    runs = setting.results
    said = [_steps(runs, against, setting.candidates["main"])]
    mean = _gain(setting.losses(against.name), setting.losses("main"), setting.measure.unit)
    others, mine = ([run.figures[n]["worst_loss"] for run in runs] for n in (against.name, "main"))
    parts = [f"{mean} on {setting.measure.what}"]
    parts.append(f"{_gain(others, mine, NATS.unit)} on the worst domain")
    said.append(f"At its end it is {' and '.join(parts)}.")
    return " ".join(filter(None, said))


def _steps(runs: Sequence[Result], against: Goal, mixture: str) -> str:
    figures = [run.figures["main"] for run in runs]
    whole = figures[0].get("steps")
    reached = [_reached(one, against) for one in figures]
    if "unknown" in reached:
        if whole is None or "steps_to_baseline" in figures[0]:  # of before all steps were counted
            return ""
        return (
            f"In how many steps {against.label}'s final loss is reached is not known: the "
            "objective is measured at the end alone."
        )
    known = [100 * step / whole for step in reached if isinstance(step, int)]
    if not known:
        return (
            f"The {mixture} mixture does not reach {against.label}'s final loss in its {whole} "
            f"steps{' with any seed' if len(runs) > 1 else ''}."
        )
    mean, half = student_t(known)
    # Of the seeds that reach it alone an interval would leave the others out.
    interval = f" ± {half:.0f}" if len(known) == len(runs) > 1 else ""
    never = len(runs) - len(known)
    missing = f" with {len(known)} of {len(runs)} seeds, and not at all with {never}"
    return (
        f"The {mixture} mixture reaches {against.label}'s final loss in {mean:.0f}{interval} % of "
        f"the steps{missing if never else ''}.{_flops(runs, mean)}"
    )


def _reached(figures: Mapping[str, Any], against: Goal) -> int | str | None:
    """Step, or None where it never is; "unknown" where steps have no objective."""
    if against.name in figures.get("steps_to", {}):
        reached: int | None = figures["steps_to"][against.name]
    elif against.name == "baseline" and "steps_to_baseline" in figures:
        reached = figures["steps_to_baseline"]
    else:
        return "unknown"
    return reached


def _flops(runs: Sequence[Result], percent: float) -> str:
    """How many of the FLOPs that is, with the runs before the final one and without."""
    before = [run.small_runs for run in runs]
    if any(cost is None for cost in before):
        return ""
    mean = 100 * sum(cost or 0.0 for cost in before) / len(before)
    if mean == 0:
        return f" It has no small runs, so that is {percent:.0f} % of the FLOPs too."
    return (
        f" That is {percent:.0f} % of the FLOPs where small runs are left out, and "
        f"{percent + mean:.0f} % with all included: the small runs took {mean:.0f} % of a final "
        "run."
    )


def _gain(others: Sequence[float], mine: Sequence[float], unit: str) -> str:
    mean, half = student_t([other - own for other, own in zip(others, mine, strict=True)])
    word = "better" if mean > 0 else "worse"
    if len(mine) == 1:
        return f"{abs(mean):.4f} {unit} {word}"
    return f"{abs(mean):.4f} ± {half:.4f} {unit} {word}"
