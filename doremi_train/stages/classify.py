"""Text classification on generated examples that are weighted towards a few real ones (see
`methods.importance`).

For every seed: split the real examples, train the checkers, write what they say of each generated
example beside the data, train a classifier with every method, measure all on the same test set. The
work is divided among the processes by whole classifiers, so their number changes no figure.

N examples.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from rich.table import Table as Printed
from torch import Tensor

from doremi_train import files
from doremi_train.classification import figures, fit, labelled, models
from doremi_train.classification.figures import Judged
from doremi_train.classification.labelled import Examples
from doremi_train.classification.models import ClassifierOptions, Kind, Table
from doremi_train.config import UserError, fingerprint
from doremi_train.console import say
from doremi_train.evaluation.statistics import spread, student_t
from doremi_train.methods import importance
from doremi_train.model import folders
from doremi_train.parallel import comm
from doremi_train.parallel.alongside import Alongside
from doremi_train.reports import classify_page
from doremi_train.stages.options import Classify
from doremi_train.stages.session import Session
from doremi_train.storage.runs import Run, lock, stop
from doremi_train.training.task import TrainingFailed


@dataclass(frozen=True)
class Data:
    """The examples of one command, also as its models read them."""

    examples: dict[str, Examples]  # generated, real, test and, where given, validation
    tables: dict[str, Table]
    classes: list[str]
    kind: Kind
    fingerprints: dict[str, Any]  # of every file, and of the model's folder


@dataclass(frozen=True)
class Seed:
    """Tables and judgements that all methods of one seed share."""

    number: int
    train: Table  # real examples that the checker is trained on
    validation: Table  # and those that it is not
    quality: Judged  # of the generated examples, by the checker of the real law
    diversity: Judged | None  # by a model of their own law, where imp asks for it


def run(session: Session) -> dict[str, Any]:
    """classify.json: {method: {figure: {mean, half_width, seeds}}}, and a page."""
    options = session.config.classify
    data = _read(session)
    numbers = [session.config.seed + index for index in range(options.seeds)]
    paths = {number: _columns(session, data, number) for number in numbers}
    _share(
        session,
        [partial(_check, session, data, number, paths[number]) for number in numbers],
        [*paths.values()],
    )
    seeds = [_seed(session, data, number, paths[number]) for number in numbers]
    todo = [
        (_recipe(session, data, method, seed.number), method, seed)
        for seed in seeds
        for method in options.methods
    ]
    _share(
        session,
        [partial(_train, session, data, *one) for one in todo],
        [run.folder / "result.json" for run, _, _ in todo],
    )
    runs: dict[tuple[str, int], Run] = {(method, seed.number): run for run, method, seed in todo}
    results: dict[str, Any] = {}
    for method in options.methods:
        results[method] = _over_seeds(
            [runs[method, number].result()["figures"] for number in numbers]
        )
    comm.on_first(lambda: _write(session, data, seeds[0], runs, results))
    return results


# ── Data ────────────────────────────────────────────────────────────────────────────


def _read(session: Session) -> Data:
    options = session.config.classify
    if options.root is None:
        raise UserError(
            "classify.root: missing; give a folder with generated.*, real.* and test.* as "
            "classify.root=…"
        )
    examples = {}
    for name in ("generated", "real", "test", "validation"):
        path = labelled.find(options.root, name)
        if path is not None:
            examples[name] = labelled.read(path, options.text_key, options.label_key)
        elif name != "validation":
            allowed = ", ".join(labelled.ENDINGS)
            raise UserError(
                f"classify.root={options.root}: has no file {name}.* with one of the endings "
                f"{allowed}"
            )
    known = labelled.classes(examples["real"], examples)
    if options.folds > len(examples["generated"]):
        raise UserError(
            f"classify.folds={options.folds}: more than the {len(examples['generated'])} generated "
            "examples"
        )
    kind = models.kind(_training(options), [*examples["generated"].texts, *examples["real"].texts])
    tables = {
        name: kind.table(one.texts, labelled.numbered(one.labels, known))
        for name, one in examples.items()
    }
    prints: dict[str, Any] = {name: one.fingerprint for name, one in examples.items()}
    if options.model not in ("ngrams", "encoder"):
        prints["model"] = folders.folder_fingerprint(Path(options.model))
    return Data(examples, tables, known, kind, prints)


def _training(options: Classify) -> ClassifierOptions:
    return ClassifierOptions(
        **{name: getattr(options, name) for name in asdict(ClassifierOptions())}
    )


def _split(session: Session, data: Data, seed: int) -> tuple[Table, Table]:
    """Real examples that checkers are trained on, and those that choose the epoch and the
    temperature."""
    real = data.tables["real"]
    if "validation" in data.tables:
        return real, data.tables["validation"]
    kept, held = labelled.split(
        real.label.numpy(), session.config.classify.validation_fraction, seed
    )
    if not len(held):
        raise UserError(
            f"classify.validation_fraction={session.config.classify.validation_fraction}: of "
            f"{len(real.label)} real examples none is left to choose the epoch by; raise it, or "
            "give a file validation.*"
        )
    return real.take(kept), real.take(held)


# ── Checkers ────────────────────────────────────────────────────────────────────────


def _columns(session: Session, data: Data, seed: int) -> Path:
    """Path of what the checkers of a seed say of the generated examples, kept beside those."""
    options = session.config.classify
    folder = options.columns or str(options.root)
    if "://" in folder:
        raise UserError(f"classify.columns: {folder} is not on this machine; give a local folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"classify.columns={folder}: no such folder can be made ({error}); give another"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"classify.columns={folder}: nothing may be written there; give another folder"
        )
    return (
        Path(folder) / f"generated.importance-{fingerprint(_said_by(session, data, seed))}.parquet"
    )


def _said_by(session: Session, data: Data, seed: int) -> dict[str, Any]:
    """Everything that decides the columns."""
    options = session.config.classify
    prints = {name: value for name, value in data.fingerprints.items() if name != "test"}
    checkers: dict[str, Any] = {"folds": options.folds} if "imp" in options.methods else {}
    checkers |= {
        "temperature": options.temperature,
        "validation_fraction": options.validation_fraction,
    }
    return {"data": prints, "training": asdict(_training(options)), "seed": seed} | checkers


def _check(session: Session, data: Data, seed: int, path: Path) -> None:
    """Train the checkers of a seed, and write their columns, unless that was done."""
    if path.exists():
        return
    with files.making(path, partial(stop.check, "classify")) as todo:
        if todo:
            files.write_bytes(path, _judged(session, data, seed))


def _judged(session: Session, data: Data, seed: int) -> bytes:
    """A parquet file of what the checkers say."""
    options, generated = session.config.classify, data.tables["generated"]
    train, validation = _split(session, data, seed)
    logs = _fitted(session, data, train, seed, validation)
    heat = figures.temperature(logs(validation), validation.label) if options.temperature else 1.0
    quality = figures.judge(logs(generated), generated.label, heat)
    columns = {"label": data.examples["generated"].labels, "log_quality": -quality.loss.numpy()}
    columns["agrees"] = quality.agrees.numpy()
    if "imp" in options.methods:
        columns["log_diversity"] = -_diversity(session, data, seed).loss.numpy()
    said = json.dumps(_said_by(session, data, seed)).encode()
    table = pa.table(columns).replace_schema_metadata({b"doremi_train": said})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def _diversity(session: Session, data: Data, seed: int) -> Judged:
    """A model of the generated law on its own examples: of each by one that was not trained on it,
    if folds allow."""
    options, generated = session.config.classify, data.tables["generated"]
    count = len(generated.label)
    if options.folds == 1:
        return figures.judge(
            _fitted(session, data, generated, seed)(generated), generated.label, 1.0
        )
    fold = labelled.folds(count, options.folds, seed)
    logs = torch.empty(count, len(data.classes), dtype=torch.float64)
    for number in range(options.folds):
        rest, own = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        logs[torch.from_numpy(own)] = _fitted(session, data, generated.take(rest), seed)(
            generated.take(own)
        )
    heat = figures.temperature(logs, generated.label) if options.temperature else 1.0
    return figures.judge(logs, generated.label, heat)


def _fitted(
    session: Session, data: Data, table: Table, seed: int, validation: Table | None = None
) -> Callable[[Table], Tensor]:
    """Log-probabilities (N, C) by a classifier that was trained on `table` with the ordinary
    loss."""
    device, plain = session.place.device, importance.Options()
    training, check = _training(session.config.classify), partial(stop.check, "classify")
    fitted = fit.fit(
        data.kind,
        len(data.classes),
        table,
        training,
        plain,
        seed,
        device,
        validation=validation,
        check=check,
    )
    return lambda other: fit.log_probabilities(fitted.model, other, device)


def _seed(session: Session, data: Data, seed: int, path: Path) -> Seed:
    """The columns of a seed, read back. Raises UserError where they are of something else."""
    try:
        table = pq.read_table(path)
        same = json.loads((table.schema.metadata or {})[b"doremi_train"]) == _said_by(
            session, data, seed
        )
        if not same or table["label"].to_pylist() != data.examples["generated"].labels:
            raise ValueError("it is not of these examples and checkers")
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: cannot be used ({error}); delete it, and it is computed again"
        ) from None

    def column(name: str) -> Tensor:
        return -torch.from_numpy(table[name].to_numpy().copy())

    agrees = torch.from_numpy(table["agrees"].to_numpy(zero_copy_only=False).copy())
    diversity = (
        Judged(column("log_diversity"), agrees, 1.0)
        if "imp" in session.config.classify.methods
        else None
    )
    return Seed(
        seed, *_split(session, data, seed), Judged(column("log_quality"), agrees, 1.0), diversity
    )


# ── Methods ─────────────────────────────────────────────────────────────────────────


def _recipe(session: Session, data: Data, method: str, seed: int) -> Run:
    said = _said_by(session, data, seed) | {"data": data.fingerprints, "method": method}
    if method != "imp":
        said.pop("folds", None)  # of the model that imp alone reads
    if method == "focal":
        said["focal_power"] = session.config.classify.focal_power
    if method in ("quality", "imp", "dimp"):
        said["weighting"] = asdict(session.config.weighting)
    return Run(session.store, "classifier", said)


def _train(session: Session, data: Data, run: Run, method: str, seed: Seed) -> None:
    """Train the classifier of a method, measure it, and write its result."""
    with lock(run.folder, str(session.run_dir.resolve())):
        if run.finished:
            return
        run.begin()
        device, plain = session.place.device, asdict(session.config.weighting)
        table, policy, reference = _ingredients(data, method, seed)
        if method == "focal":
            plain |= {"power": session.config.classify.focal_power, "normalize": False}
        weighting = importance.Options(**plain, policy=policy)  # type: ignore[arg-type]
        log = files.JsonLines(run.folder / "metrics.jsonl")
        fitted = fit.fit(
            data.kind, len(data.classes), table, _training(session.config.classify), weighting,
            seed.number, device, reference, seed.validation, log.write,
            partial(stop.check, "classify"),
        )  # fmt: skip
        log.close()
        if policy != "none":
            own = figures.judge(
                fit.log_probabilities(fitted.model, table, device), table.label, 1.0
            ).loss
            np.save(run.folder / "weights.npy", _final_weights(own, reference, weighting).numpy())
        test = data.tables["test"]
        test_figures = figures.figures(
            fit.log_probabilities(fitted.model, test, device), test.label
        )
        if not all(map(math.isfinite, test_figures.values())):
            raise UserError(
                f"{method}: its loss is not finite: a checker gives some label a probability of "
                "exactly 0, or classify.learning_rate is too high; set weighting.clip, or lower it"
            )
        run.finish({"figures": test_figures, "epoch": fitted.epoch, "examples": len(table.label)})


def _ingredients(data: Data, method: str, seed: Seed) -> tuple[Table, str, Tensor | None]:
    """What a method trains on, its policy, and the column (N,) that this reads."""
    generated, loss = data.tables["generated"], seed.quality.loss.float()
    if method == "real":
        return seed.train, "none", None
    if method == "both":
        return _joined(seed.train, generated), "none", None
    if method == "filter":
        kept = np.flatnonzero(seed.quality.agrees.numpy())
        if not len(kept):
            raise UserError(
                "classify.methods: filter keeps nothing, since the checker agrees with no "
                "generated label"
            )
        return generated.take(kept), "none", None
    if method == "imp":
        assert seed.diversity is not None
        return (
            generated,
            "imp",
            importance.log_ratio(seed.quality.loss, seed.diversity.loss).float(),
        )
    # The checker of quality alone is imp with a model of the data that finds every label certain.
    policy = {"generated": "none", "focal": "focal", "quality": "imp", "dimp": "dimp"}[method]
    return generated, policy, loss if policy in ("imp", "dimp") else None


def _joined(one: Table, two: Table) -> Table:
    width = max(one.ids.shape[1], two.ids.shape[1])
    ids = [
        torch.nn.functional.pad(table.ids, (0, width - table.ids.shape[1])) for table in (one, two)
    ]
    return Table(
        torch.cat(ids), torch.cat([one.length, two.length]), torch.cat([one.label, two.label])
    )


def _final_weights(own: Tensor, reference: Tensor | None, weighting: importance.Options) -> Tensor:
    """(N,) float64 of every training example under the trained model, with mean 1 where they are
    normalised."""
    losses = own[:, None]
    column = None if reference is None else reference[:, None].double()
    domain = torch.zeros(len(own), dtype=torch.int64)
    stats = importance.observe(losses, column, domain, 1, weighting)
    state = importance.update(importance.init(1, 0, weighting), stats, weighting)
    return importance.weigh(state, domain, stats.tokens, weighting, losses, column)[:, 0] * len(own)


# ── Work and results ────────────────────────────────────────────────────────────────


def _share(session: Session, jobs: Sequence[Callable[[], None]], paths: Sequence[Path]) -> None:
    """Every process does its part of the jobs, and waits until all have left their files."""
    world = comm.world()
    with Alongside(stop):
        for job in jobs[world.rank :: world.size]:
            stop.check("classify")
            job()
    stop.check("classify")
    limit = time.monotonic() + session.config.training.timeout
    while missing := [path for path in paths if not path.exists()]:
        stop.check("classify")
        if time.monotonic() > limit:
            raise TrainingFailed(
                f"{missing[0]}: another process has written it, and it is not here; it must be on "
                "a file system that all nodes share: set store"
            )
        time.sleep(0.1)


def _over_seeds(figures: Sequence[dict[str, float]]) -> dict[str, Any]:
    summaries = {}
    for name in figures[0]:
        values = [one[name] for one in figures]
        mean, half = student_t(values)
        summaries[name] = {
            "mean": mean,
            "half_width": half if math.isfinite(half) else None,
            "seeds": values,
        }
    return summaries


def _write(
    session: Session,
    data: Data,
    seed: Seed,
    runs: Mapping[tuple[str, int], Run],
    results: dict[str, Any],
) -> None:
    files.write_json(session.run_dir / "classify.json", results)
    columns = {"accuracy": 4, "macro_f1": 4, "calibration_error": 4, "loss": 4}
    printed = Printed(
        "method",
        *columns,
        title="On the test set; mean ± half-width of the 95 % interval over seeds",
    )
    for method, line in results.items():
        printed.add_row(
            method, *(spread(line[name]["seeds"], digits) for name, digits in columns.items())
        )
    say(printed)
    weights: dict[str, NDArray[np.float64]] = {}
    for (method, number), run in runs.items():
        if number == seed.number and (run.folder / "weights.npy").exists():
            weights[method] = np.load(run.folder / "weights.npy", allow_pickle=False)
    page = session.run_dir / "report.html"
    quality = (-seed.quality.loss).exp().numpy()
    classify_page.write(page, results, data.examples["generated"], weights, quality)
    say(f"report: {page}")
