"""What finished runs say: read from their folders, grouped by what varies, compared, and put into
one plain sentence.

Losses are validation losses in nats per token, or bits per byte where tokenisers differ. Their mean
is over domains, and an interval is a 95 % Student-t interval over seeds; where mixtures are
compared it is that of the differences, seed by seed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from doremi_train import files
from doremi_train.data.tokens.shards import read_manifest
from doremi_train.evaluation.statistics import listed, student_t, unit
from doremi_train.methods import HEURISTICS, objective
from doremi_train.model import configs

# Then others; reference and proxy last.
_ORDER = (
    "main",
    "baseline",
    "natural",
    "uniform",
    "temperature",
    "unimax",
)
_BESIDE = ("reference", "proxy", "start")  # there before the final runs, and no candidates
TRACE_POINTS = 400  # of a curve over steps: more cannot be seen


class Result(NamedTuple):
    """One finished run_dir."""

    folder: Path
    config: dict[str, Any]  # what decides the result, flat
    mixture: dict[str, Any]  # weights.json
    figures: dict[str, Any]  # evaluation.json
    curves: dict[str, list[dict[str, Any]]]  # evaluations.jsonl of each model
    # domain_weights.jsonl of each proxy of the last round, or of the main run.
    traces: list[list[dict[str, Any]]]
    rounds: list[dict[str, float]]  # mean weights of each round, where there are several
    # batch_selection.jsonl of the final model; empty where it took every sequence.
    picks: list[dict[str, Any]]
    findings: list[dict[str, Any]]  # findings.json
    warnings: list[str]  # of plan.json
    downstream: dict[str, Any]  # downstream.json; empty where there is none
    small_runs: float | None  # FLOPs of plan.json before the final run, in units of it
    swarm: dict[str, Any]  # its fit.json, and `runs` of runs.jsonl; empty where there was none
    validation: dict[str, tuple[int, int | None]]  # documents and bytes of each domain's split
    tokenizer: str | None  # its fingerprint; None: its data is gone

    @property
    def weights(self) -> dict[str, float]:
        return self.mixture["weights"]

    @property
    def way(self) -> str:
        """Where the final model's mixture comes from: a file that it followed, or the method."""
        return "followed" if self.config.get("main.mixture_file") else self.mixture["method"]

    @property
    def learned(self) -> bool:
        """Whether that mixture was learned, or is one that was given."""
        return self.way not in (*HEURISTICS, "target", "file", "followed")


class Measure(NamedTuple):
    """What models are compared by; less is better."""

    unit: str
    of: Callable[[dict[str, Any]], float]  # the figures of a model in evaluation.json
    what: str = "the mean over domains"


NATS = Measure("nats per token", lambda figures: figures["mean_loss"])
# A token of one tokeniser is not a token of another; a byte is a byte.
BITS = Measure(
    "bits per byte",
    lambda figures: fmean(domain["bits_per_byte"] for domain in figures["domains"].values()),
)


class Setting(NamedTuple):
    """Runs that differ in their seed only."""

    # Keys that differ between the settings of a sweep, and this one's values.
    varying: dict[str, Any]
    size: int  # parameters of the proxy, without embeddings
    main_size: int  # of the final model
    results: list[Result]
    measure: Measure = NATS

    @property
    def label(self) -> str:
        parts = [f"{key}={value}" for key, value in self.varying.items()]
        return ", ".join(parts)

    @property
    def models(self) -> dict[str, str]:
        """The name that a reader sees of every trained model. Models that are the same run are
        one."""
        same: dict[tuple[float, ...], list[str]] = {}
        known = [
            name
            for name in self.results[0].figures
            if all(name in run.figures for run in self.results)
        ]
        order = {
            name: place
            for place, name in enumerate(
                (*_ORDER, *sorted(set(known) - {*_ORDER, *_BESIDE}), *_BESIDE)
            )
        }
        for name in sorted(known, key=lambda name: order[name]):
            same.setdefault(tuple(self.losses(name)), []).append(name)
        return {names[0]: self._label(names) for names in same.values()}

    @property
    def candidates(self) -> dict[str, str]:
        """Models of the final size, to be compared with the learned mixture's, which comes
        first."""
        return {name: label for name, label in self.models.items() if name not in _BESIDE}

    def losses(self, name: str) -> list[float]:
        """Mean loss of a model for each seed, in the unit of `measure`."""
        return [self.measure.of(run.figures[name]) for run in self.results]

    def gain(self, name: str) -> tuple[float, float]:
        """How much higher another model's loss is than the learned mixture's: mean and half-width
        over paired seeds."""
        pairs = zip(self.losses(name), self.losses("main"), strict=True)
        return student_t([other - learned for other, learned in pairs])

    def _label(self, names: list[str]) -> str:
        if names[0] == "main":
            run = self.results[0]
            return "learned" if run.learned else run.way
        if names[0] == "baseline":
            return f"{self.results[0].config['reference.mixture']} (baseline)"
        return names[0]


def read(folder: Path, config: dict[str, Any]) -> Result:
    """A run_dir that was evaluated; what other stages left is taken where it is there."""
    figures = files.read_json(folder / "evaluation.json")
    numbers = sorted(
        folder.glob("proxy/round-*"), key=lambda path: int(path.name.partition("-")[2])
    )
    proxies = sorted(numbers[-1].glob("seed-*")) if numbers else [folder / "proxy"]
    itself = (folder / "main" / "domain_weights.jsonl").exists()  # the main run learned it
    learners = [folder / "main"] if itself else proxies
    traces = [list(files.read_lines(learner / "domain_weights.jsonl")) for learner in learners]
    rounds = [_mean_weights(sorted(number.glob("seed-*/result.json"))) for number in numbers]
    place = folder / "plan.json"
    plan = files.read_json(place) if place.exists() else {}
    findings = folder / "findings.json"
    fit = folder / "swarm" / "fit.json"
    tasks = folder / "downstream.json"
    manifest = folder / "prepare" / "manifest.json"
    data = read_manifest(manifest.parent) if manifest.exists() else {}
    return Result(
        folder=folder,
        config=config,
        mixture=files.read_json(folder / "weights.json"),
        figures=figures,
        curves={
            name: list(files.read_lines(folder / name / "evaluations.jsonl")) for name in figures
        },
        traces=[trace for trace in traces if trace],
        rounds=rounds if len(rounds) > 1 else [],
        picks=list(files.read_lines(folder / "main" / "batch_selection.jsonl")),
        findings=files.read_json(findings) if findings.exists() else [],
        warnings=plan.get("warnings", []),
        small_runs=small_runs(plan),
        downstream=files.read_json(tasks) if tasks.exists() else {},
        swarm=files.read_json(fit) | {"runs": list(files.read_lines(fit.with_name("runs.jsonl")))}
        if fit.exists()
        else {},
        validation={
            name: (described["validation"]["documents"], described["validation"]["bytes"])
            for name, described in data.get("domains", {}).items()
        },
        tokenizer=data["tokenizer"]["fingerprint"] if data else None,
    )


def small_runs(plan: Mapping[str, Any]) -> float | None:
    """FLOPs of all runs before the final one, in units of it; None where a plan does not say."""
    stages = plan.get("stages", {})
    costs = {name: stage.get("whole_flops") for name, stage in stages.items()}
    if not costs.get("main") or None in costs.values():
        return None
    before = [costs[name] for name, stage in stages.items() if stage["kind"] != "main"]
    return float(sum(before) / costs["main"])


def _mean_weights(paths: Sequence[Path]) -> dict[str, float]:
    mixtures = [files.read_json(path)["weights"] for path in paths]
    return (
        {name: fmean(weights[name] for weights in mixtures) for name in mixtures[0]}
        if mixtures
        else {}
    )


def incomparable(results: Sequence[Result]) -> str:
    """Why the losses of these runs cannot be set beside each other; "" where they can."""
    first, *rest = results
    for run in rest:
        here, there = _domains(first), _domains(run)
        if here != there:
            return (
                f"their domains differ: {listed(sorted(here ^ there)[:5])} "
                f"{'is' if len(here ^ there) == 1 else 'are'} not in all of them"
            )
        known = here & first.validation.keys() & run.validation.keys()
        other = [name for name in known if first.validation[name] != run.validation[name]]
        if other:
            return f"the validation text of {listed(sorted(other)[:5])} differs"
    if _measure(results) is BITS and not all(
        domain.get("bits_per_byte")
        for run in results
        for figures in run.figures.values()
        for domain in figures["domains"].values()
    ):
        return "their tokenisers differ, and how many bytes their tokens stand for is not known"
    return ""


def _domains(run: Result) -> set[str]:
    return set(run.figures["main"]["domains"])


def _measure(results: Sequence[Result]) -> Measure:
    if len({run.tokenizer for run in results} - {None}) > 1:
        return BITS
    wanted = [_objective(run.config) for run in results]
    if wanted[0] == objective.Options() or any(one != wanted[0] for one in wanted):
        return NATS
    figures = results[0].figures["main"]
    alike = figures["tasks" if wanted[0].over == "tasks" else "domains"]
    weights = wanted[0].metrics or dict.fromkeys(alike, 1.0)
    counted = [name for name, weight in weights.items() if weight]
    of = unit(counted, figures.get("tasks", {}), figures.get("scores", {}))
    return Measure(of, partial(_score, wanted[0]), "the objective")


def _objective(config: Mapping[str, Any]) -> objective.Options:
    """The objective of a flat configuration."""

    def of(key: str) -> dict[str, float] | None:
        start = f"objective.{key}."
        named = {
            name.removeprefix(start): v for name, v in config.items() if name.startswith(start)
        }
        return named or None

    return objective.Options(
        config.get("objective.reduce", "mean"),
        of("metrics"),
        guard=of("guard"),
        standardise=config.get("objective.standardise", False),
        over=config.get("objective.over", "domains"),
    )


def _standardised(measure: Measure, runs: Sequence[Result]) -> Measure:
    """A measure of runs that differ in their seed only, standardised where that is asked for: by
    natural's seeds, of which there may be too few."""
    wanted = _objective(runs[0].config)
    if measure in (NATS, BITS) or not wanted.standardise:
        return measure
    trained = "main" if runs[0].way == "natural" else "natural"
    if runs[0].config.get("reference.mixture", "natural") == "natural":
        trained = trained if trained in runs[0].figures else "baseline"
    known = [run.figures[trained] for run in runs if trained in run.figures]
    too_few = NATS._replace(
        what="the mean over domains, since objective.standardise wants two seeds of natural"
    )
    if len(known) < 2:
        return too_few
    named, counted = _values(wanted, known[0])
    values = np.array([[*_values(wanted, figures)[0].values()] for figures in known])
    found = objective.objective(wanted, list(named), values.mean(0), counted)
    try:
        found = objective.standardised(found, list(named), values.std(0, ddof=1))
    except ValueError:  # a metric that is the same with all seeds
        return too_few

    def of(figures: Mapping[str, Any]) -> float:
        return float(found.scores(np.array([[*_values(wanted, figures)[0].values()]]))[0])

    return Measure(found.unit, of, measure.what)


def _score(wanted: objective.Options, figures: Mapping[str, Any]) -> float:
    named, counted = _values(wanted, figures)
    values = np.array([list(named.values())])
    found = objective.objective(wanted, list(named), values[0], counted)
    return float(found.scores(values)[0])


def _values(
    wanted: objective.Options, figures: Mapping[str, Any]
) -> tuple[dict[str, float], list[str]]:
    """The metrics of a model by name, and those that count where none are named."""
    losses = {name: domain["loss"] for name, domain in figures["domains"].items()}
    counted = list(figures["tasks"] if wanted.over == "tasks" else losses)
    if "target_loss" in figures:
        losses["target"] = figures["target_loss"]
    return losses | figures.get("tasks", {}) | figures.get("scores", {}), counted


def settings(results: Sequence[Result]) -> list[Setting]:
    """The runs by everything that varies over them but the seed, smallest models first."""
    measure = _measure(results) if not incomparable(results) else NATS
    configs = [run.config for run in results]
    varying = [
        key
        for key in sorted(set().union(*configs) - {"seed"})
        if any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    groups: dict[str, Setting] = {}
    for run in results:
        values = {key: run.config.get(key) for key in varying}
        size, main_size = _size(run, "proxy"), _size(run, "main")
        if any(key.startswith("model.") for key in varying):
            shown = {key: value for key, value in values.items() if not key.startswith("model.")}
            shown = {"proxy": f"{size:,} parameters"} | shown
        else:
            shown = values
        groups.setdefault(
            repr(values), Setting(shown, size, main_size, [], measure)
        ).results.append(run)
    judged = [one._replace(measure=_standardised(measure, one.results)) for one in groups.values()]
    return sorted(
        judged,
        key=lambda setting: (setting.size, setting.main_size, _sortable(setting.varying)),
    )


def _sortable(varying: dict[str, Any]) -> list[tuple[int, float, str]]:
    numeric = (int, float)
    return [
        (0, float(value), "")
        if isinstance(value, numeric) and not isinstance(value, bool)
        else (1, 0.0, str(value))
        for value in varying.values()
    ]


def _size(run: Result, stage: str) -> int:
    """Parameters without embeddings of the model of a stage, from its own config."""
    places = [
        run.folder / stage / "model",
        *run.folder.glob(f"{stage}/round-*/seed-*/model"),
        run.folder / "swarm" / "confirm" / "natural" / "model",
        run.folder / "reference" / "model",
        run.folder / "main" / "model",
    ]
    paths = [place / "config.json" for place in places if (place / "config.json").exists()]
    return configs.parameters(files.read_json(paths[0]))[1] if paths else 0


def verdict(setting: Setting) -> str:
    """What the mixture gained over each mixture trained beside it, in one plain sentence or two."""
    seeds, labels = len(setting.results), setting.candidates
    mixture = f"the {labels['main']} mixture"
    others, unit = [name for name in labels if name != "main"], setting.measure.unit
    mean, half = student_t(setting.losses("main"))
    if not others:
        size = f"{mean:.4f}" if seeds == 1 else f"{mean:.4f} ± {half:.4f}"
        return (
            f"{mixture.capitalize()} reaches {size} {unit}; it was not compared with any "
            "other mixture."
        )
    if seeds == 1:
        parts = [f"{abs(gain):.4f} {'better' if gain > 0 else 'worse'} than {labels[name]}"
                 for name in others for gain in [setting.gain(name)[0]]]  # fmt: skip
        equal = [labels[name] for name in others if setting.gain(name)[0] <= 0]
        return (
            f"With one seed {mixture} reaches {mean:.4f} {unit} on {setting.measure.what}: "
            f"{listed(parts)}{f', so no better than {listed(equal)}' if equal else ''}. One seed, "
            "no interval: differences of the size of the seed-to-seed spread decide nothing."
        )
    parts, equal = [], []
    for name in others:
        gain, half = setting.gain(name)
        differs = "better than" if gain > 0 else "worse than"
        word = differs if abs(gain) > half else "not distinguishable from"
        if gain <= half:
            equal.append(labels[name])
        parts.append(f"{word} {labels[name]} (by {gain:+.4f} ± {half:.4f} {unit})")
    remedy = f" {listed(equal).capitalize()} would serve as well." if equal else ""
    return (
        f"Over {seeds} runs {mixture} is {listed(parts)}.{remedy} Paired 95 % Student-t intervals "
        "over seeds; plus means that the other's loss is higher."
    )
