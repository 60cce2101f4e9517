"""The pictures of a report, of one setting and of several, from what their runs left.

K domains, S seeds or proxies, T steps, N points of a curve.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_train.evaluation import results
from doremi_train.evaluation.results import NATS, Setting
from doremi_train.evaluation.statistics import student_t
from doremi_train.methods import ONLINE
from doremi_train.reports.charts import COLORS, Curve, Mark, Point, lines, rows, smooth

Place = Callable[[Setting], float]

CHOSEN = 10  # domains that get a colour and a name in a chart over steps
_MOST_ROWS = 40  # of a chart with a row a domain: those that moved most
_MOVES = {  # what weights follow, by its name in a trace: title and unit
    "excess_loss": ("Excess loss over the reference", "nats per token"),
    "learning_speed": (
        "What a step teaches of each domain, by the law of its losses",
        "nats per token",
    ),
    "reward": ("Reward of each domain", "nats per token"),
    "alignment": ("Alignment of a domain's gradient with its target's", "⟨g, target⟩"),
}
MODEL_COLORS = dict(
    zip(("main", "uniform", "natural", "unimax", "temperature"), COLORS[:5], strict=True)
)
MODEL_COLORS["baseline"] = "#8b919c"


def mixture_points(setting: Setting) -> dict[str, Point]:
    """The mixture with its interval: over the runs, or over the proxies of the one run."""
    first = setting.results[0]
    if len(setting.results) == 1:
        intervals = first.mixture.get("interval") or {}
        return {
            name: Point(weight, *intervals.get(name, ())) for name, weight in first.weights.items()
        }
    points = {}
    for name in first.weights:
        mean, half = student_t([run.weights[name] for run in setting.results])
        points[name] = Point(mean, max(0.0, mean - half), min(1.0, mean + half))
    return points


# ── Charts of one setting ─────────────────────────────────────────────────────────────────────────


def mixture(setting: Setting, free: dict[str, dict[str, float]], prefix: str) -> str:
    """The mixture before and after: the free mixtures, and the learned one with its interval."""
    points = mixture_points(setting)
    start = free.get("natural") or {name: 1 / len(points) for name in points}
    moved = sorted(points, key=lambda name: abs(points[name].value - start[name]), reverse=True)[
        :_MOST_ROWS
    ]
    names = sorted(moved, key=lambda name: start[name] - points[name].value)
    kinds = {
        name: [Point(weights[domain]) for domain in names]
        for name, weights in free.items()
        if name != "unimax"
    }
    learned = setting.models["main"]
    title = "Weights before and after" + (
        f": the {len(names)} that moved most" if len(moved) < len(points) else ""
    )
    shown = {**kinds, learned: [points[name] for name in names]}
    colors = {
        "natural": MODEL_COLORS["natural"],
        "uniform": MODEL_COLORS["uniform"],
        learned: MODEL_COLORS["main"],
    }
    return rows(f"{prefix}{title}", "part of the tokens", names, shown, colors)


def picks(setting: Setting, prefix: str) -> list[str]:
    """Which domains were picked of every batch's candidates over the steps, and penalties over
    scores."""
    traces = [run.picks for run in setting.results if run.picks]
    if not traces:
        return []
    steps = min(len(trace) for trace in traces)
    names = list(traces[0][0]["picked"])
    # (S, T, K) each.
    picked, drawn = (
        smooth(_column(traces, key, names, steps), max(1, steps // 20))
        for key in ("picked", "candidates")
    )
    kept = np.unique(np.linspace(0, steps - 1, results.TRACE_POINTS).astype(np.int64))
    part = picked[:, kept] / np.maximum(drawn[:, kept], 1e-9)
    ratio = np.array([[line["penalty_to_score"] for line in trace[:steps]] for trace in traces])
    return [
        lines(
            f"{prefix}Part of a domain's candidates that was picked (running mean)",
            "step",
            "part",
            {name: Curve(kept + 1, part[..., k]) for k, name in enumerate(names)},
        ),
        lines(
            f"{prefix}Second term of GREATS over the first",
            "step",
            "penalty / score",
            {"": Curve(kept + 1, ratio[:, kept])},
        ),
    ]


def proxy(setting: Setting, prefix: str) -> list[str]:
    """How the weights came about: α, its effective number of domains, and what moved it, over the
    proxy's steps."""
    traces = [trace for run in setting.results for trace in run.traces]
    if not traces:
        return []
    steps = min(len(trace) for trace in traces)
    names = list(traces[0][0]["weights"])
    key = next(key for key in _MOVES if key in traces[0][0])
    weights, moved = (_column(traces, name, names, steps) for name in ("weights", key))  # (S, T, K)
    kept = np.unique(np.linspace(0, steps - 1, results.TRACE_POINTS).astype(np.int64))
    x = kept + 1
    mean = weights.mean(0)
    order = np.argsort(-np.abs(mean[-1] - mean[0]) - np.abs(mean.mean(0) - mean[0]))
    chosen = set(order[:CHOSEN].tolist()) if len(names) > CHOSEN else set(range(len(names)))

    def by_domain(values: NDArray[np.float64]) -> dict[str, Curve]:
        colors = iter(COLORS)
        return {
            name: Curve(x, values[:, kept, k], next(colors) if k in chosen else "grey")
            for k, name in enumerate(names)
        }

    online = setting.results[0].mixture["method"] in ONLINE
    one, many = ("run", "runs") if online else ("proxy", "proxies")
    band = (
        f"mean of {len(traces)} {many}, band from lowest to highest"
        if len(traces) > 1
        else f"one {one}"
    )
    effective = np.exp(-(weights * np.log(np.maximum(weights, 1e-300))).sum(-1))  # (S, T)
    charts = [
        lines(f"{prefix}Domain weights α ({band})", "step", "weight", by_domain(weights)),
        lines(
            f"{prefix}Effective number of domains, exp(H(α))",
            "step",
            "domains",
            {"α": Curve(x, effective[:, kept], COLORS[0])},
            [Mark(f"all {len(names)}, uniform", y=float(len(names))), Mark("one", y=1.0)],
        ),
        lines(
            f"{prefix}{_MOVES[key][0]} (running mean)",
            "step",
            _MOVES[key][1],
            by_domain(smooth(moved, steps // 40)),
        ),
    ]
    rounds = [run.rounds for run in setting.results if run.rounds]
    if rounds:
        count = min(len(mixtures) for mixtures in rounds)
        charts.append(
            lines(
                f"{prefix}Weights after each round",
                "round",
                "weight",
                {
                    name: Curve(
                        np.arange(1, count + 1),
                        [[r[name] for r in mixtures[:count]] for mixtures in rounds],
                    )
                    for k, name in enumerate(names)
                    if k in chosen
                },
                settings=True,
            )
        )
    return charts


def _column(
    traces: Sequence[list[dict[str, Any]]], key: str, names: Sequence[str], steps: int
) -> NDArray[np.float64]:
    """Values (S, T, K) of a key of the traces; a skipped step has no excess, and counts as 0."""
    rows_ = [
        [[line[key][name] or 0.0 for name in names] for line in trace[:steps]] for trace in traces
    ]
    return np.array(rows_, dtype=np.float64)


def learning(setting: Setting, prefix: str) -> list[str]:
    """Validation loss over steps of everything trained at the final size, and where the baseline's
    end is reached."""
    curves = {}
    for name in setting.candidates:
        logs = [run.curves.get(name, []) for run in setting.results]
        points = min(len(curve) for curve in logs)
        if points:
            x = np.array([line["step"] for line in logs[0][:points]])
            # (S, N)
            y = np.array([[line["mean_loss"] for line in curve[:points]] for curve in logs])
            curves[name] = Curve(x, y, MODEL_COLORS.get(name))
    if not curves:
        return []
    band = (
        f" (band: lowest to highest of {len(setting.results)} seeds)"
        if len(setting.results) > 1
        else ""
    )
    labels, x_label, y_label = setting.candidates, "step of the final run", "nats per token"
    named = {labels[name]: curve for name, curve in curves.items()}
    title = f"{prefix}Learning curves: mean validation loss{band}"
    charts = [lines(title, x_label, y_label, named, _goal_marks(setting))]
    goal = _goal(setting)
    if goal in curves and len(curves) > 1:
        # Seed by seed, because the spread of the curves themselves hides how they differ.
        ahead = {
            labels[name]: Curve(
                curve.x, np.asarray(curves[goal].y) - np.asarray(curve.y), curve.color
            )
            for name, curve in curves.items()
            if name != goal and np.shape(curve.y) == np.shape(curves[goal].y)
        }
        title = f"{prefix}How far ahead of {labels[goal]}{band}"
        charts.append(lines(title, x_label, y_label, ahead, [Mark(f"{labels[goal]}", y=0.0)]))
    return charts


def downstream(setting: Setting, prefix: str) -> list[str]:
    """Accuracy over steps, a picture a task, of everything trained at the final size."""
    first = setting.results[0].downstream
    charts = []
    for task in next(iter(first.values()), {}):
        curves = {}
        for name, label in setting.candidates.items():
            logs = [run.downstream.get(name, {}).get(task, []) for run in setting.results]
            points = min(len(curve) for curve in logs)
            if points:
                x = np.array([line["step"] for line in logs[0][:points]])
                # (S, N)
                y = np.array(
                    [[100 * line["accuracy"] for line in curve[:points]] for curve in logs]
                )
                curves[label] = Curve(x, y, MODEL_COLORS.get(name))
        if curves:
            axes = ("step of the final run", "exact match, %")
            charts.append(
                lines(f"{prefix}Accuracy on {task}, one shot", *axes, curves, settings=True)
            )
    return charts


def _goal(setting: Setting) -> str:
    """The model that others are measured against, or nothing."""
    return next(
        (name for name in ("baseline", "natural", "uniform") if name in setting.candidates), ""
    )


def _goal_marks(setting: Setting) -> list[Mark]:
    """The baseline's final loss, and the step at which the learned mixture reaches it."""
    if "baseline" not in setting.candidates:
        return []
    label = setting.candidates["baseline"]
    final = fmean(run.figures["baseline"]["mean_loss"] for run in setting.results)
    marks = [Mark(f"final loss of {label}", y=final)]
    if setting.measure is not NATS:  # these curves are of the mean over domains
        return marks
    reached = [run.figures["main"].get("steps_to_baseline") for run in setting.results]
    known = [step for step in reached if step is not None]
    if known:
        never = (
            f", {len(reached) - len(known)} of {len(reached)} runs never"
            if len(known) < len(reached)
            else ""
        )
        marks.append(Mark(f"reached at step {fmean(known):.0f}{never}", x=fmean(known)))
    return marks


def domain_losses(setting: Setting, prefix: str) -> list[str]:
    """Distance of each mixture from the baseline in every domain, or from the reference where there
    is no baseline."""
    labels = setting.candidates
    goal = _goal(setting)
    domains = list(setting.results[0].figures["main"]["domains"])
    if not goal or not domains:
        return []
    points: dict[str, list[Point]] = {}
    for name, label in labels.items():
        if name == goal:
            continue
        points[label] = []
        for domain in domains:
            gains = [
                run.figures[name]["domains"][domain]["loss"]
                - run.figures[goal]["domains"][domain]["loss"]
                for run in setting.results
            ]
            mean, half = student_t(gains)
            ends = (mean - half, mean + half) if len(gains) > 1 else ()
            points[label].append(Point(mean, *ends))
    learned = points[labels["main"]]
    order = sorted(range(len(domains)), key=lambda k: learned[k].value)
    if len(order) > _MOST_ROWS:
        order = order[: _MOST_ROWS // 2] + order[-_MOST_ROWS // 2 :]
    return [
        rows(
            f"{prefix}Loss per domain against {labels[goal]}: left of the line is better",
            "difference in nats per token",
            [domains[k] for k in order],
            {label: [by_domain[k] for k in order] for label, by_domain in points.items()},
            {label: MODEL_COLORS[name] for name, label in labels.items() if name in MODEL_COLORS},
            zero=True,
        )
    ]


def interval(values: Sequence[float]) -> Point:
    mean, half = student_t(values)
    return Point(mean, mean - half, mean + half) if len(values) > 1 else Point(mean)
