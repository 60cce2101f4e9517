"""The page of `stage=classify`: every method on the test set, and the examples that count most and
least.

N generated examples.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from doremi_train.classification.labelled import Examples
from doremi_train.evaluation.statistics import spread, student_t
from doremi_train.reports import charts
from doremi_train.reports.charts import Point
from doremi_train.reports.page import write_page

_SHOWN, _CHARACTERS = 8, 400  # examples of each end, and of each text

Figures = Mapping[str, Mapping[str, Any]]  # of each method, as in classify.json


def write(
    page: Path,
    figures: Figures,
    examples: Examples,
    weights: Mapping[str, NDArray[np.float64]],
    quality: NDArray[np.float64],
) -> None:
    """`weights` (N,) of each method that has some, and p̂'(y|x) (N,)."""
    columns = list(next(iter(figures.values())))
    write_page(
        page,
        "classify.html.jinja",
        title=str(page.parent),
        verdict=verdict(figures),
        chart=_chart(figures),
        columns=[column.replace("_", " ") for column in columns],
        rows=[
            (name, [spread(by_column[column]["seeds"]) for column in columns])
            for name, by_column in figures.items()
        ],
        seeds=len(next(iter(figures.values()))["accuracy"]["seeds"]),
        methods=[
            (name, _note(method_weights), _sides(examples, method_weights, quality))
            for name, method_weights in weights.items()
        ],
    )


def verdict(figures: Figures) -> str:
    """Which method is best, and what it gained over the ordinary loss on the generated examples."""
    best = max(figures, key=lambda name: figures[name]["accuracy"]["mean"])
    mine = figures[best]["accuracy"]["seeds"]
    said = f"The best accuracy on the test set is that of {best}, {spread(mine)}."
    if best == "generated" or "generated" not in figures:
        return said
    plain = figures["generated"]["accuracy"]["seeds"]
    gain, half = student_t([a - b for a, b in zip(mine, plain, strict=True)])
    if len(mine) == 1:
        return (
            f"{said} That is {gain:+.4f} against the ordinary loss on the generated examples; one "
            "seed, no interval."
        )
    word = "more than" if gain > half else "not distinguishable from"
    return (
        f"{said} That is {word} the ordinary loss on the generated examples (by {gain:+.4f} ± "
        f"{half:.4f}, paired)."
    )


def _chart(figures: Figures) -> str:
    points = []
    for by_column in figures.values():
        mean, half = by_column["accuracy"]["mean"], by_column["accuracy"]["half_width"]
        points.append(Point(mean) if half is None else Point(mean, mean - half, mean + half))
    return charts.rows("Accuracy on the test set", "accuracy", list(figures), {"accuracy": points})


def _note(weights: NDArray[np.float64]) -> str:
    total, square = float(weights.sum()), float((weights**2).sum())
    effective = total**2 / square if square else 0.0
    return (
        f"Of {len(weights)} generated examples {effective:.0f} do the work (effective sample "
        "size), under the model of the first seed at its end."
    )


def _sides(
    examples: Examples, weights: NDArray[np.float64], quality: NDArray[np.float64]
) -> list[tuple[str, list[dict[str, str]]]]:
    order = np.argsort(weights, kind="stable")
    return [
        (side, [_shown(examples, weights, quality, i) for i in chosen.tolist()])
        for side, chosen in (("Count most", order[::-1][:_SHOWN]), ("Count least", order[:_SHOWN]))
    ]


def _shown(
    examples: Examples, weights: NDArray[np.float64], quality: NDArray[np.float64], i: int
) -> dict[str, str]:
    text, label = examples.texts[i], examples.labels[i]
    cut = text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} …"
    return {
        "label": label,
        "weight": f"{weights[i]:.3g}",
        "quality": f"{quality[i]:.3f}",
        "text": cut,
    }
