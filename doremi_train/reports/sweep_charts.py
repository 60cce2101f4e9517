"""Charts over the settings of a sweep."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from doremi_train.evaluation.results import Setting
from doremi_train.reports import run_charts
from doremi_train.reports.charts import Curve, lines, rows
from doremi_train.reports.run_charts import Place


def compare(settings: Sequence[Setting]) -> list[str]:
    """Result and weights against what varies: along an axis where it is numbers, else a row for
    each setting."""
    axis = _axis(settings)
    return _setting_rows(settings) if axis is None else _setting_curves(settings, *axis)


def _setting_rows(settings: Sequence[Setting]) -> list[str]:
    labels = shared_models(settings)
    colors = {
        label: run_charts.MODEL_COLORS[name]
        for name, label in labels.items()
        if name in run_charts.MODEL_COLORS
    }
    losses = {
        label: [run_charts.interval(setting.losses(name)) for setting in settings]
        for name, label in labels.items()
    }
    domains = _shared_domains(settings)
    weights = {
        d: [
            run_charts.interval([run.weights[d] for run in setting.results]) for setting in settings
        ]
        for d in domains
    }
    names = [setting.label for setting in settings]
    return [
        rows(
            "Mean validation loss of each setting", settings[0].measure.unit, names, losses, colors
        ),
        rows("Weights of each setting", "weight", names, weights),
    ]


def _setting_curves(settings: Sequence[Setting], key: str, place: Place, x: str) -> list[str]:
    labels = shared_models(settings)
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        rest = ", ".join(
            f"{name}={value}" for name, value in setting.varying.items() if name != key
        )
        groups.setdefault(rest, []).append(setting)
    seeds = min(len(setting.results) for setting in settings)
    losses, weights = dict[str, Curve](), dict[str, Curve]()
    # By model and group: (S, N).
    loss_values: dict[str, dict[str, NDArray[np.float64]]] = {name: {} for name in labels}
    for rest, group in groups.items():
        after = f" ({rest})" if rest else ""
        places = [place(setting) for setting in group]
        for name, label in labels.items():
            values = np.array([setting.losses(name)[:seeds] for setting in group]).T
            if any(np.array_equal(values, other) for other in loss_values[name].values()):
                continue  # what does not depend on the keys of the groups is drawn once
            loss_values[name][rest] = values
            color = (
                run_charts.MODEL_COLORS.get(name) if len(groups) == 1 or name != "main" else None
            )
            losses[label + (after if name == "main" else "")] = Curve(
                places, values, color, dashed=name != "main"
            )
        for domain in _shared_domains(settings):
            values = np.array(
                [[run.weights[domain] for run in setting.results[:seeds]] for setting in group]
            ).T
            weights[domain + after] = Curve(places, values)
    band = f" (band: lowest to highest of {seeds} seeds)" if seeds > 1 else ""
    ticks = [place(setting) for setting in settings]
    wide = min(ticks) > 0 and max(ticks) / min(ticks) > 5
    return [
        lines(
            f"Mean validation loss{band}",
            x,
            settings[0].measure.unit,
            losses,
            settings=True,
            logarithmic=wide,
        ),
        lines(f"Weights{band}", x, "weight", weights, settings=True, logarithmic=wide),
    ]


def shared_models(settings: Sequence[Setting]) -> dict[str, str]:
    """The models that every setting has, and how they are called."""
    known = {name: label for name, label in settings[0].models.items() if name != "reference"}
    runs = [run for setting in settings for run in setting.results]
    shared = [name for name in known if all(name in run.figures for run in runs)]
    return {name: "proxy itself" if name == "proxy" else known[name] for name in shared}


def _shared_domains(settings: Sequence[Setting]) -> list[str]:
    """The domains that are drawn: those of the first setting that all have, since settings may
    differ in their data."""
    runs = [run for setting in settings for run in setting.results]
    return [name for name in runs[0].weights if all(name in run.weights for run in runs)][
        : run_charts.CHOSEN
    ]


def _axis(settings: Sequence[Setting]) -> tuple[str, Place, str] | None:
    """What to draw along x: (key, place of a setting, name of the axis); None where nothing that
    varies is a number."""
    if len({setting.size for setting in settings}) > 1:
        return "proxy", lambda setting: setting.size, "parameters of the proxy, without embeddings"
    if len({setting.main_size for setting in settings}) > 1:
        return (
            "main.model",
            lambda setting: setting.main_size,
            "parameters of the final model, without embeddings",
        )
    counts = {
        key: len({setting.varying[key] for setting in settings})
        for key in settings[0].varying
        if all(
            isinstance(s.varying[key], int | float) and not isinstance(s.varying[key], bool)
            for s in settings
        )
    }
    if not counts:
        return None
    key = max(counts, key=lambda name: (counts[name], name == "proxy.step_size"))
    return key, lambda setting: setting.varying[key], key
