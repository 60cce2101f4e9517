"""What the page of a run says: cards, warnings, tables of domains and models, samples of text."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from doremi_train import files
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation import results
from doremi_train.evaluation.detectors import effective_number
from doremi_train.evaluation.headline import headline
from doremi_train.evaluation.results import Result, Setting
from doremi_train.evaluation.statistics import spread
from doremi_train.methods import HEURISTICS, heuristics
from doremi_train.reports import headroom_text, run_charts, selection_page, sweep_charts

_MOST_SAMPLES = 60  # domains of which text is shown
_MOST_RUNS, _MOST_WEIGHTS = 60, 12  # of a swarm, in its table
_SAMPLE_WINDOW, _SAMPLE_TOKENS, _SAMPLE_CHARACTERS = 2000, 160, 320
COLUMNS = (
    "model", "mean loss", "worst domain", "domains better than baseline",
    "steps to baseline's loss", "mean loss − learned, paired",
)  # fmt: skip


def selection_of(run: Result) -> dict[str, Any]:
    """What the run chose of its corpus; empty where it took everything, or a choice made
    elsewhere."""
    folder = run.folder / "select"
    return (
        selection_page.content(folder, run.config.get("selection.vocabulary"))
        if folder.exists()
        else {}
    )


def headline_of(settings: Sequence[Setting]) -> str:
    """What the page and the terminal begin with: the headline of the one setting, or of the best of
    several; "" where there is none."""
    if results.incomparable([run for setting in settings for run in setting.results]):
        return ""
    best = min(settings, key=lambda setting: fmean(setting.losses("main")))
    said = headline(best)
    return f"{best.label}: {said}" if said and len(settings) > 1 else said


def overall(settings: Sequence[Setting]) -> str:
    """The sentence on top: the verdict of the one setting, or which of several did best."""
    if len(settings) == 1:
        return results.verdict(settings[0])
    why = results.incomparable([run for setting in settings for run in setting.results])
    if why:
        return f"{len(settings)} settings, which are not compared, for {why}. " + " ".join(
            f"{setting.label}: {results.verdict(setting)}" for setting in settings
        )
    best = min(settings, key=lambda setting: fmean(setting.losses("main")))
    runs = sum(len(setting.results) for setting in settings)
    return (
        f"{runs} runs of {len(settings)} settings; the lowest mean loss is that of {best.label} "
        f"({spread(best.losses('main'))} {best.measure.unit}). There: {results.verdict(best)}"
    )


# ── One setting ───────────────────────────────────────────────────────────────────────────────────


def section(setting: Setting, number: int, how: Mapping[str, str], root: Path) -> dict[str, Any]:
    """Everything the page in the folder `root` shows of one setting; `how` says of every way how
    its mixture comes about."""
    first = setting.results[0]
    folder = first.folder / "prepare"
    part = first.config.get("data.only"), first.config.get("data.least_tokens", 0)
    store = TokenStore.open(folder, None, *part) if folder.exists() else None
    prefix = f"{setting.label}: " if setting.label else ""
    free = _free_mixtures(first, store)
    charts = {
        "mixture": [run_charts.mixture(setting, free, prefix)],
        "proxy": run_charts.proxy(setting, prefix),
        "picks": run_charts.picks(setting, prefix),
        "downstream": run_charts.downstream(setting, prefix),
        "gain": [*run_charts.learning(setting, prefix), *run_charts.domain_losses(setting, prefix)],
    }
    return {
        "label": setting.label or ("over seeds" if len(setting.results) > 1 else ""),
        "headline": headline(setting),
        "verdict": results.verdict(setting),
        "cards": _cards(setting),
        "warnings": warnings_of(setting),
        "charts": charts,
        "free": list(free),
        "domains": _domain_rows(setting, free, store),
        "method": first.mixture["method"],
        "how": how.get(first.mixture["method"], how["file"]),
        "swarm": _swarm(first, root),
        "headroom": _headroom(first),
        "policy": first.config.get("batch_selection.method", "none"),
        "models": list(setting.models.values()),
        "tasks": _task_rows(setting),
        "losses": loss_rows(setting),
        "table": _model_rows(setting),
        "extremes": _extremes(first, store) if store else [],
        "samples": _samples(store) if store and number == 0 else [],
        "provenance": first.mixture.get("provenance", {}) | {"runs": len(setting.results)},
    }


def _free_mixtures(run: Result, store: TokenStore | None) -> dict[str, dict[str, float]]:
    """The mixtures that cost nothing, which a learned one has to beat: {name: {domain: weight}}."""
    if store is None:
        return {}
    config = run.config
    steps = config.get("main.steps") or config["training.steps"]
    budget = (
        config.get("main.tokens")
        or steps * config["training.batch_size"] * config["training.sequence_length"]
    )
    sizes = torch.from_numpy(store.sizes("train").astype(np.float64))
    options = heuristics.Options(max_epochs=config["mixture.max_epochs"])
    mixtures = {}
    for name in ("natural", "uniform", "unimax"):
        try:
            mixtures[name] = store.named(HEURISTICS[name](sizes, budget, options))
        except ValueError:  # UniMax where the budget is more than its epochs of all data
            continue
    return mixtures


def _cards(setting: Setting) -> list[tuple[str, str]]:
    """Numbers for the top of the page, each with what it is."""
    seeds, models = setting.results, setting.candidates
    cards = [(spread(setting.losses("main")), f"{setting.measure.unit}, {models['main']} mixture")]
    for name, label in models.items():
        if name != "main":
            gain, half = setting.gain(name)
            interval = f" ± {half:.4f}" if len(seeds) > 1 else ""
            cards.append((f"{gain:+.4f}{interval}", f"gained over {label}"))
    figures = [run.figures["main"] for run in seeds]
    if "domains_better_than_baseline" in figures[0] and "baseline" in models:
        better = spread([f["domains_better_than_baseline"] for f in figures], 1).replace(".0", "")
        cards.append(
            (f"{better} of {len(seeds[0].weights)}", f"domains better than {models['baseline']}")
        )
    if "steps_to_baseline" in figures[0] and "baseline" in models:
        steps = spread([f["steps_to_baseline"] for f in figures], 0)
        cards.append(
            (
                f"{steps} of {figures[0]['steps']}",
                f"steps to the final loss of {models['baseline']}",
            )
        )
    elif "steps" in figures[0] and "baseline" in models:
        said = f"steps to {models['baseline']}: the objective is measured at the end alone"
        cards.append(("not known", said))
    effective = [float(effective_number(np.array(list(run.weights.values())))) for run in seeds]
    cards.append(
        (
            f"{spread(effective, 2)} of {len(seeds[0].weights)}",
            "effective number of domains, exp(H(α))",
        )
    )
    return cards


def warnings_of(setting: Setting) -> list[str]:
    """What the detectors and the plan said, each once, with the part of the runs that it holds
    for."""
    said: dict[tuple[str, ...], list[str]] = {}
    for run in setting.results:
        for finding in run.findings:
            said.setdefault((finding["kind"], *finding["domains"]), []).append(finding["message"])
        for warning in run.warnings:
            if warning not in (finding["message"] for finding in run.findings):
                said.setdefault((warning,), []).append(warning)
    total = len(setting.results)
    return [
        messages[0] + (f" (in {len(messages)} of {total} runs)" if total > 1 else "")
        for messages in said.values()
    ]


def _headroom(run: Result) -> str:
    """What any mixture can gain, or what the swarm gained; "" where neither was asked."""
    path = run.folder / "headroom" / "headroom.json"
    if path.exists():
        return headroom_text.line(files.read_json(path))
    return headroom_text.of_swarm(run.swarm) if run.swarm else ""


def _swarm(run: Result, root: Path) -> dict[str, Any]:
    """What a swarm proposed, what came of it, its runs, best first, and where its page to steer by
    is from the folder `root`; empty where there was none."""
    if not run.swarm:
        return {}
    tried = [
        [
            line["name"],
            f"{line['predicted']:.4f} ({line['interval'][0]:.4f} to {line['interval'][1]:.4f})"
            if "interval" in line
            else "",
            f"{line['realised']:.4f}",
            "; ".join(line["refused"]),
        ]
        for line in run.swarm["confirmed"]
    ]
    runs = sorted(run.swarm["runs"], key=lambda line: line["loss"])
    shown = runs if len(runs) <= _MOST_RUNS else runs[: _MOST_RUNS // 2] + runs[-_MOST_RUNS // 2 :]
    keys = ("loss", "fitted", "out_of_fold", "distance")
    return {
        "verdict": run.swarm["verdict"],
        "diagnostics": {
            name.replace("_", " "): f"{value:.4f}"
            for name, value in run.swarm["diagnostics"].items()
        },
        "tried": tried,
        "columns": ["run", *keys, *(f"weight of {name}" for name in run.weights)][
            : 1 + len(keys) + _MOST_WEIGHTS
        ],
        "runs": [
            [
                line["run"].removeprefix("swarm/"),
                *(f"{line[key]:.4f}" for key in keys),
                *(f"{weight:.3f}" for weight in list(line["weights"].values())[:_MOST_WEIGHTS]),
            ]
            for line in shown
        ],
        "hidden": len(runs) - len(shown),
        "steer": _link(run.folder / "steer.html", root),
    }


def _link(page: Path, root: Path) -> str:
    """The address of a page from a folder; "" where there is none."""
    return quote(os.path.relpath(page, root)) if page.exists() else ""


def _domain_rows(
    setting: Setting, free: dict[str, dict[str, float]], store: TokenStore | None
) -> list[dict[str, Any]]:
    points = run_charts.mixture_points(setting)
    sizes = store.named(store.sizes("train")) if store else {}
    lost = dict.fromkeys(points, 0.0) | (store.named(store.unwritable()) if store else {})
    largest = max(point.value for point in points.values()) or 1.0
    rows = []
    for name, point in points.items():
        epochs = [
            run.mixture["epochs"][name]
            for run in setting.results
            if name in run.mixture.get("epochs", {})
        ]
        rows.append(
            {
                "name": name,
                "tokens": f"{sizes[name]:,}" if name in sizes else "",
                "unwritable": f"{lost[name]:.1%}" if any(lost.values()) else "",
                "free": [f"{weights[name]:.4f}" for weights in free.values()],
                "weight": f"{point.value:.4f}",
                "width": f"{100 * point.value / largest:.1f}",
                "interval": f"{point.low:.4f} – {point.high:.4f}"
                if point.low is not None
                else "one seed",
                "epochs": spread(epochs, 2) if epochs else "",
            }
        )
    return rows


def loss_rows(setting: Setting) -> list[dict[str, Any]]:
    """Rows of domains: every model's loss, with bits per byte; the best of a row is marked."""
    rows = []
    for domain in setting.results[0].weights:
        cells: list[dict[str, Any]] = []
        for name in setting.models:
            figures = [run.figures[name]["domains"].get(domain, {}) for run in setting.results]
            values = [figure["loss"] for figure in figures if figure]
            bits = [figure["bits_per_byte"] for figure in figures if figure.get("bits_per_byte")]
            cells.append(
                {"value": fmean(values) if values else None, "text": spread(values), "bits": bits}
            )
        known = [cell["value"] for cell in cells if cell["value"] is not None]
        for cell in cells:
            cell["best"] = bool(known) and cell["value"] == min(known)
            cell["bits"] = f"{fmean(cell['bits']):.3f}" if cell["bits"] else ""
        rows.append({"name": domain, "cells": cells})
    return rows


def _model_rows(setting: Setting) -> list[list[str]]:
    rows = []
    for name, label in setting.models.items():
        figures = [run.figures[name] for run in setting.results]
        row = [
            label,
            spread([f["mean_loss"] for f in figures]),
            spread([f["worst_loss"] for f in figures]),
        ]
        for key, digits in (("domains_better_than_baseline", 1), ("steps_to_baseline", 0)):
            row.append(spread([f[key] for f in figures], digits) if key in figures[0] else "")
        pairs = zip(setting.losses(name), setting.losses("main"), strict=True)
        row.append("" if name == "main" else spread([other - main for other, main in pairs]))
        rows.append(row)
    return rows


def _task_rows(setting: Setting) -> list[list[str]]:
    """Final accuracy in per cent of every model on every task, with its standard error where there
    is one seed."""
    rows = []
    for name, label in setting.candidates.items():
        for task in setting.results[0].downstream.get(name, {}):
            last = [
                run.downstream[name][task][-1] for run in setting.results if name in run.downstream
            ]
            accuracy = spread([100 * line["accuracy"] for line in last], 1)
            error = (
                f" (standard error {100 * last[0]['standard_error']:.1f})" if len(last) == 1 else ""
            )
            rows.append([task, label, f"{accuracy}{error}", str(last[0]["examples"])])
    return sorted(rows)


def _samples(store: TokenStore) -> list[dict[str, Any]]:
    """Two pieces of training text of each domain, from the beginning of a document where one is
    near."""
    tokenizer, samples = store.tokenizer(), []
    for k, name in enumerate(store.domains[:_MOST_SAMPLES]):
        length = int(min(_SAMPLE_WINDOW, store.sizes("train")[k] // 4))
        available = store.sequences("train", length)[k] if length > 1 else 0
        if not available:
            continue
        places = np.unique(np.array([0.25, 0.75]) * available).astype(np.int64)
        texts = []
        for tokens in store.gather("train", np.full(len(places), k), places, length):
            ends = np.flatnonzero(tokens[:-_SAMPLE_TOKENS] == store.end_of_document)
            start = int(ends[0]) + 1 if len(ends) else 0
            text = tokenizer.decode(tokens[start : start + _SAMPLE_TOKENS].tolist())
            texts.append(text.replace("\ufffd", "").strip()[:_SAMPLE_CHARACTERS])
        samples.append({"name": name, "texts": texts})
    return samples


def _extremes(run: Result, store: TokenStore) -> list[dict[str, Any]]:
    """The candidates of the last quarter of the steps that scored highest and lowest, with their
    text."""
    tokenizer, length, extremes = store.tokenizer(), run.config["training.sequence_length"], []
    for name, best in (("highest", max), ("lowest", min)):
        lines = [line[name] for line in run.picks[-max(1, len(run.picks) // 4) :]]
        if not lines:
            continue
        pick = best(lines, key=lambda line: line["score"])
        where = np.array([store.domains.index(pick["domain"])]), np.array([pick["sequence"]])
        text = tokenizer.decode(store.gather("train", *where, length)[0][:_SAMPLE_TOKENS].tolist())
        texts = [text.replace("\ufffd", "").strip()[:_SAMPLE_CHARACTERS]]
        extremes.append({"name": f"{name} score, {pick['domain']}", "texts": texts})
    return extremes


# ── Several settings ──────────────────────────────────────────────────────────────────────────────


def summary(settings: Sequence[Setting]) -> dict[str, Any]:
    """A row for each setting: the loss of every model, and what the learned mixture gained over
    each."""
    labels = {
        name: label
        for name, label in sweep_charts.shared_models(settings).items()
        if name != "proxy"
    }
    names, others = list(labels), [name for name in labels if name != "main"]
    rows = []
    for setting in settings:
        gains = []
        for name in others:
            mean, half = setting.gain(name)
            gains.append(f"{mean:+.4f}" + (f" ± {half:.4f}" if len(setting.results) > 1 else ""))
        row = [
            setting.label,
            str(len(setting.results)),
            *(spread(setting.losses(name)) for name in names),
            *gains,
        ]
        rows.append(row)
    gained = [f"gained over {labels[name]}" for name in others]
    return {
        "columns": ["setting", "seeds", *(labels[name] for name in names), *gained],
        "rows": rows,
    }
