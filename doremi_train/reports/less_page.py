"""The page of `stage=select selection=less`: scores of every target, what is at both ends, and who
chooses alike."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from doremi_train.reports import charts
from doremi_train.reports.charts import Curve
from doremi_train.reports.page import write_page

_CHARACTERS = 400  # of a text


def write(page: Path, result: Mapping[str, Any]) -> None:
    """`result` is the choice's `result.json`."""
    write_page(
        page,
        "less.html.jinja",
        title=str(page.parent),
        result=result,
        chart=_chart(result["targets"]),
        targets=[_target(name, part) for name, part in result["targets"].items()],
    )


def _chart(targets: Mapping[str, Any]) -> str:
    curves = {}
    for name, part in targets.items():
        edges = np.array(part["histogram"]["edges"])
        curves[name] = Curve((edges[1:] + edges[:-1]) / 2, [part["histogram"]["counts"]])
    return charts.lines("Scores of the pool", "influence on the target", "examples", curves)


def _target(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    methods = part["methods"]
    rows = [
        (
            method,
            choice["examples"],
            choice["tokens"],
            [f"{choice['shared'][other] / max(choice['examples'], 1):.0%}" for other in methods],
        )
        for method, choice in methods.items()
    ]
    pairs = [tuple(map(_shown, pair)) for pair in zip_longest(part["top"], part["bottom"])]
    return {
        "name": name,
        "subtasks": part["subtasks"],
        "methods": list(methods),
        "rows": rows,
        "pairs": pairs,
    }


def _shown(example: Mapping[str, Any] | None) -> dict[str, str] | None:
    if example is None:
        return None
    text = example["text"]
    cut = text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]} …"
    where = f"{Path(example['file']).name}, line {example['line']}"
    return {"score": f"{example['score']:.3g}", "where": where, "text": cut}
