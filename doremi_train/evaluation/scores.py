"""Scores of models that their user evaluates, as files say them: results of lm-evaluation-harness
(`results_DATE.json`, of 0.4 on), and plain {model: {metric: score}}.

A metric of the harness is named TASK/METRIC, as in arc_easy/acc_norm, or TASK/METRIC/FILTER where
it was filtered; its standard error is none.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from doremi_train.config import UserError, read_object

_REMEDY = (
    "give results of lm-evaluation-harness, or a file of {MODEL FOLDER: {METRIC: SCORE, …}, …}"
)


def read(places: Sequence[str], key: str) -> dict[str, dict[str, float]]:
    """{model: {metric: score}} of files, and of all *.json in folders, the later ones by name over
    the others; a place that is not there yet has none. Raises UserError, which names `key`, for
    other files."""
    found: dict[str, dict[str, float]] = {}
    for path in [path for place in places for path in _files(Path(place))]:
        content = read_object(path, f"{key}: {path}", _REMEDY)
        harness = isinstance(content.get("results"), dict) and "config" in content
        for model, scores in (_of_harness(content) if harness else content).items():
            found.setdefault(model, {}).update(_numbers(scores, f"{key}: {path}, {model}"))
    return found


def _files(place: Path) -> Iterable[Path]:
    with contextlib.suppress(OSError):  # of what is too long for a name
        if place.is_dir():
            return sorted(place.rglob("*.json"), key=lambda path: path.name)
        return [place] if place.exists() else []
    return []


def _of_harness(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The one model of a file of the harness, by what it was loaded from."""
    model, arguments = content.get("model_name"), content["config"].get("model_args")
    if isinstance(arguments, Mapping) and "pretrained" in arguments:
        model = arguments["pretrained"]
    elif isinstance(arguments, str):
        pairs = dict(part.partition("=")[::2] for part in arguments.split(","))
        model = pairs.get("pretrained", model)
    scores = {}
    for task, entries in content["results"].items():
        for name, value in entries.items():
            metric, _, kind = name.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and metric != "sample_len" and not metric.endswith("_stderr"):
                scores["/".join([task, metric, *([kind] if kind not in ("", "none") else [])])] = (
                    value
                )
    return {str(model): scores}


def _numbers(scores: Any, where: str) -> dict[str, float]:
    if not isinstance(scores, Mapping):
        raise UserError(f"{where}: must be {{METRIC: SCORE}}, not {scores!r:.50}; {_REMEDY}")
    for metric, value in scores.items():
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise UserError(f"{where}: {metric}={value!r:.50} is no number; mend the file")
    return {metric: float(value) for metric, value in scores.items()}
