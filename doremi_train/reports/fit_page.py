"""The page of `stage=fit`: the mixture that other people's runs speak for, and how far the fit is
to be believed.

K domains, M metrics.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doremi_train.reports import charts, steer_page
from doremi_train.reports.charts import Point
from doremi_train.reports.page import write_page
from doremi_train.reports.steer_page import Given

_MOST_ROWS = 40  # of a chart


def write(page: Path, content: Mapping[str, Any], steer: Given | None) -> None:
    """Write the page of what `fit.json` holds, with what there is to steer."""
    domains, metrics = content["domains"], content["metrics"]
    proposed = content["proposed"]
    write_page(
        page,
        "fit.html.jinja",
        title=str(page.parent.parent),
        verdict=content["verdict"],
        notes=content["notes"],
        runs=content["runs"],
        domains=len(domains),
        metrics=len(metrics),
        regressor=content["regressor"],
        cards=_cards(content),
        steer=None if steer is None else steer_page.section(steer),
        charts=[_mixture(content), _change(content)] if proposed else [],
        domain_columns=["domain", "natural", *(["proposed"] if proposed else []), "most in a run"],
        domain_rows=[_domain(name, domain, proposed) for name, domain in domains.items()],
        metric_columns=_metric_columns(proposed),
        metric_rows=[_metric(name, metric, proposed) for name, metric in metrics.items()],
    )


def _cards(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    goal = content["objective"]
    cards = [(f"{goal['spearman']:.3f}", "Spearman of the objective, out of fold")]
    if content["proposed"]:
        shown = "objective, predicted for the proposal"
        cards = [(f"{goal['proposed']:.4f}", shown), *cards]
    return [
        *cards[:1],
        (f"{goal['natural']:.4f}", f"objective, predicted for {goal['over']}"),
        *cards[1:],
    ]


def _mixture(content: Mapping[str, Any]) -> str:
    domains = dict(
        sorted(content["domains"].items(), key=lambda pair: -pair[1]["proposed"])[:_MOST_ROWS]
    )
    points = {
        kind: [Point(domain[kind]) for domain in domains.values()]
        for kind in ("natural", "proposed")
    }
    return charts.rows("Weights", "part of the tokens", list(domains), points)


def _change(content: Mapping[str, Any]) -> str:
    metrics = dict(list(content["metrics"].items())[:_MOST_ROWS])
    points = []
    for metric in metrics.values():
        unit = abs(metric["natural"]) or 1.0
        ends = (metric[end] - metric["natural"] for end in ("proposed", "low", "high"))
        points.append(Point(*(100 * end / unit for end in ends)))
    title = "Predicted change against natural: left of the line is less"
    return charts.rows(title, "% of natural", list(metrics), {"proposed": points}, zero=True)


def _domain(name: str, domain: Mapping[str, float], proposed: bool) -> list[str]:
    kinds = ["natural", *(["proposed"] if proposed else []), "most"]
    return [name, *(f"{domain[kind]:.4f}" for kind in kinds)]


def _metric_columns(proposed: bool) -> list[str]:
    change = ["proposed", "95 %", "change"] if proposed else []
    return ["metric", "counts", "natural", *change, "may lose", "runs", "Spearman", "error"]


def _metric(name: str, metric: Mapping[str, Any], proposed: bool) -> list[str]:
    change: list[str] = []
    if proposed:
        unit = abs(metric["natural"]) or 1.0
        change = [
            f"{metric['proposed']:.4f}",
            f"{metric['low']:.4f} to {metric['high']:.4f}",
            f"{(metric['proposed'] - metric['natural']) / unit:+.2%}",
        ]
    guard = "" if metric["guard"] is None else f"{metric['guard']:.2%}"
    figures = [str(metric["runs"]), f"{metric['spearman']:.3f}", f"{metric['error']:.4f}"]
    return [name, f"{metric['weight']:g}", f"{metric['natural']:.4f}", *change, guard, *figures]
