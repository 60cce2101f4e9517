"""What a command works with: the whole configuration, the processes, and where things stand on disk.

Each stage is a module of this package with `run(session)`, read top to bottom.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import yaml
from pydantic.dataclasses import dataclass

from doremi_train import (
    checkpoint,
    comm,
    downstream,
    engine,
    evaluation,
    exports,
    files,
    launcher,
    model,
    runs,
    slurm,
    tracking,
    train,
)
from doremi_train.batch_selection import Options as BatchSelection
from doremi_train.classifier import Options as ClassifierOptions
from doremi_train.config import (
    STRICT,
    Count,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    UserError,
    flatten,
    load,
    redact,
)
from doremi_train.data import options as data_options
from doremi_train.lora import Options as LoraOptions
from doremi_train.methods import HEURISTICS, ONLINE, doge, doremi, heuristics, importance, mixmin, swarm, vocabulary
from doremi_train.remote import Mirror
from doremi_train.selection import options as selection_options
from doremi_train.track import Bar, Part, console


@dataclass(frozen=True, config=STRICT)
class Reference:
    mixture: str = "natural"  # α_ref: a mixture computed from sizes, or `file`, that of mixture=file
    path: str | None = None  # an existing model folder instead of training one
    losses: Literal["live", "cached"] = "live"  # computed with every batch, or once for all in the store, in float16


@dataclass(frozen=True, config=STRICT)
class Proxy(doremi.Options):
    accumulation: Literal["exact", "lagged"] = "exact"  # which α weighs the loss when a batch comes in several parts
    rounds: Positive = 1
    round_tolerance: NonNegativeFloat = 1e-3  # rounds end when no weight moves by more
    seeds: Positive = 1
    match_repetition: bool = False  # read as much less of every domain as the run is shorter than the final one


@dataclass(frozen=True, config=STRICT)
class Doge(doge.Options):
    target_batch: Positive = 8  # sequences of the target that a step looks at, where target.* names one


@dataclass(frozen=True, config=STRICT)
class Online:
    prior: str = "natural"  # a mixture computed from sizes: where the run begins
    floor: Fraction = 0.01  # least weight of a domain, as far as mixture.max_epochs leaves it
    warmup: Fraction = 0.05  # part of the run on the prior
    every: Positive | None = None  # steps between fits of ado, and changes of dro; null: a 50th of the run
    step_size: NonNegativeFloat = 1.0  # η of dro
    target_losses: dict[str, PositiveFloat] | None = None  # of dro, nats per token; null: those of the reference


@dataclass(frozen=True, config=STRICT)
class Target:
    files: tuple[str, ...] | None = None  # paths, globs or URLs
    domains: tuple[str, ...] | None = None  # or the validation text of these, apart from what is evaluated
    sequences: Positive = 64


@dataclass(frozen=True, config=STRICT)
class Swarm(swarm.Options):
    prior: str = "natural"  # a mixture computed from sizes: where draws lie around, and what λ pulls towards
    rounds: Positive = 1  # of draws; from the second on where the fit expects low losses
    candidates: Positive = 2  # proposals that are trained, each next one nearer to the prior
    reuse: bool = True  # fit also the runs in the store that differ in their mixture only
    frozen: str | None = None  # a weights.json, whose domains keep their proportions among themselves


@dataclass(frozen=True, config=STRICT)
class MixtureOptions(heuristics.Options):
    method: str = "doremi"
    path: str | None = None  # of method `file`
    format: str | None = None  # of that file, where it is a trainer's
    weights: dict[str, float] | None = None  # of method `file`, instead of one
    normalize: bool = False  # accept weights that do not sum to 1


@dataclass(frozen=True, config=STRICT)
class Main:
    model: str | None = None  # a preset; null: the proxy's
    steps: Positive | None = None  # null: training.steps
    tokens: Positive | None = None  # of the final run this mixture is for; null: what main.steps makes
    comparisons: tuple[str, ...] | None = None  # trained beside it at its size; null: see Config.comparisons


Method = Literal["generated", "real", "both", "focal", "quality", "filter", "imp", "dimp"]


@dataclass(frozen=True, config=STRICT)
class Classify(ClassifierOptions):
    root: str | None = (
        None  # a folder with generated.*, real.*, test.* and maybe validation.*: .jsonl, .parquet or .csv
    )
    validation_fraction: Fraction = 0.2  # of the real examples of every label, where there is no validation file
    text_key: str = "text"
    label_key: str = "label"
    methods: tuple[Method, ...] = get_args(Method)
    seeds: Positive = 4
    folds: Positive = 5  # parts of the generated examples, each judged by a model of the others; 1: by one of them all
    temperature: bool = True  # scale the checkers to what they were not trained on
    focal_power: NonNegativeFloat = 2.0  # γ of focal
    columns: str | None = None  # folder of what the checkers say; null: classify.root


@dataclass(frozen=True, config=STRICT)
class Compare:
    methods: tuple[str, ...] = ("doremi", "swarm")
    baselines: tuple[str, ...] = ("natural", "uniform", "unimax")  # longer by what small runs cost, and as long
    search: bool = True  # random search with as many small runs too
    seeds: Positive = 3  # end to end: each derives the weights anew


@dataclass(frozen=True, config=STRICT)
class Finetune:
    model: str | None = None  # local transformers folder with its tokeniser, or a model folder of an earlier run
    lora: LoraOptions = LoraOptions()


@dataclass(frozen=True, config=STRICT)
class Downstream:
    tasks: tuple[str, ...] = ()  # of downstream.FORMS
    files: dict[str, str] | None = None  # {task: folder with test.jsonl and train.jsonl}; cloze needs none
    examples: Positive = 200  # of each, at most


@dataclass(frozen=True, config=STRICT)
class Export:
    to: str | None = None  # a trainer: a key of exports.FORMATS
    path: str | None = None  # of the file; null: in run_dir/export
    paths: dict[str, str] | None = None  # where the trainer finds each domain
    unit: exports.Unit | None = None  # of its draws; null: see exports


@dataclass(frozen=True, config=STRICT)
class Submit:
    cluster: Literal["none", "local", "slurm"] = "none"  # where child runs go; none: one after another in this process
    parallel: Positive = 4  # at once
    timeout_minutes: Positive = 240  # of one Slurm job, which saves and is requeued until it is done
    nodes: Positive = 1  # of one child, as the keys below
    tasks_per_node: Positive = 1
    gpus_per_node: Count = 0
    cpus_per_task: Positive | None = None
    partition: str | None = None
    extra: dict[str, str | int] | None = None  # other options of sbatch, as in {account: mine}


@dataclass(frozen=True, config=STRICT)
class Config:
    stage: str
    run_dir: str
    store: str | None
    remote: str | None  # path or fsspec URL
    seed: Count
    data: data_options.Options
    model: model.Options
    training: train.Options
    weighting: importance.Weighting
    engine: launcher.Options
    evaluation: evaluation.Options
    reference: Reference
    proxy: Proxy
    doge: Doge
    online: Online
    mixmin: mixmin.Options
    target: Target
    swarm: Swarm
    mixture: MixtureOptions
    main: Main
    selection: selection_options.Options
    vocabulary: vocabulary.Options
    batch_selection: BatchSelection
    classify: Classify
    compare: Compare
    finetune: Finetune
    downstream: Downstream
    export: Export
    submit: Submit
    tracking: tracking.Options

    def __post_init__(self) -> None:
        if not self.run_dir.strip():  # would be the current folder, and this is most likely an unset variable
            raise UserError("run_dir='': must name a folder for what the run writes; give it as run_dir=runs/mine")
        _one_of("selection", self.selection.method, ["none", "less", *selection_options.METHODS])
        learned = ["doremi", "doge", *ONLINE, "mixmin", "swarm", "search"]
        _one_of("mixture", self.mixture.method, [*learned, "file", *HEURISTICS])
        _one_of("reference.mixture", self.reference.mixture, ["file", *HEURISTICS])
        _one_of("swarm.prior", self.swarm.prior, list(HEURISTICS))
        _one_of("online.prior", self.online.prior, list(HEURISTICS))
        if self.training.loss_weighting == "imp" and self.reference.path is None:
            raise UserError(
                "training.loss_weighting=imp: compares a reference of the text that is wanted with a model of this "
                "data, and without reference.path both would be trained on this data; give reference.path=…, or take "
                "dimp or rho"
            )
        for name in self.comparisons:
            _one_of("main.comparisons", name, ["baseline", *HEURISTICS])
        given = [self.mixture.path, self.mixture.weights]
        if len(given) - given.count(None) != (self.mixture.method == "file"):
            raise UserError(
                f"mixture.path={self.mixture.path}, mixture.weights={self.mixture.weights}: one of them goes with "
                "mixture=file, and only with it; write mixture=file mixture.path=weights.json"
            )
        if self.reference.mixture == "file" and (self.mixture.method != "file" or self.mixture.format is not None):
            raise UserError(
                "reference.mixture=file: is the weights.json or the weights of mixture=file; write mixture=file "
                "mixture.path=weights.json, without mixture.format"
            )
        if self.stage == "swarm" and self.mixture.method != "swarm":
            raise UserError(f"stage=swarm: goes with mixture=swarm, not {self.mixture.method}; write mixture=swarm too")
        if self.mixture.format is not None:
            _one_of("mixture.format", self.mixture.format, list(exports.FORMATS))
            if self.mixture.path is None:
                raise UserError(f"mixture.format={self.mixture.format}: it is that of mixture.path, which is missing")
        for name in self.downstream.tasks:
            _one_of("downstream.tasks", name, list(downstream.FORMS))
            if name != "cloze" and name not in (self.downstream.files or {}):
                raise UserError(
                    f"downstream.tasks: {name} reads test.jsonl and train.jsonl of a folder of yours; give it as "
                    f"downstream.files={{{name}: FOLDER}}"
                )
        if self.downstream.tasks:
            downstream.require()
        for name in self.compare.methods:
            _one_of("compare.methods", name, learned)
        for name in self.compare.baselines:
            _one_of("compare.baselines", name, list(HEURISTICS))
        if self.export.to is not None or self.stage == "export":
            _one_of("export.to", str(self.export.to), list(exports.FORMATS))

    @property
    def comparisons(self) -> tuple[str, ...]:
        """What the final model has to beat: baseline is α_ref, and natural and uniform are never missing."""
        if self.main.comparisons is not None:
            return self.main.comparisons
        return ("baseline", "uniform") if self.reference.mixture == "natural" else ("baseline", "natural", "uniform")


def _one_of(key: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: unknown; allowed: {', '.join(allowed)}")


# What may change between two commands on one run_dir: it says how to compute, not what.
_FREE = (
    "stage", "run_dir", "store", "remote", "data.max_bad_lines", "data.allow_pipe", "selection.engine",
    "selection.workers", "selection.less.batch_tokens",
)  # fmt: skip
_FREE_GROUPS = ("compare", "downstream", "engine", "export", "submit", "tracking")
_FREE_TRAINING = (
    "micro_batch_size", "activation_checkpointing", "checkpoint_every", "keep_checkpoints", "log_every", "threads",
    "timeout", "snapshots",
)  # fmt: skip


@plain_dataclass
class Session:
    """One command on this process: its configuration as composed and as checked, and its place among the processes."""

    config: Config
    plain: Mapping[str, Any]
    place: engine.Place
    results: dict[str, Any] = field(default_factory=dict)  # of the stages done in this command
    bar: Bar | None = None  # over many commands, of which this is one

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def store(self) -> Path:
        return Path(self.config.store) if self.config.store else self.run_dir / "store"

    @functools.cached_property
    def mirror(self) -> Mirror | None:
        """The store's second home, if there is one."""
        return Mirror(self.config.remote) if self.config.remote else None

    @functools.cached_property
    def tracking(self) -> tracking.Tracking:
        """Where this command's curves are shown."""
        return tracking.Tracking(self.config.tracking, self.run_dir, self.plain)

    def over(self, label: str, total: int) -> Bar:
        """The progress of several runs, `total` tokens: a bar of their own, or a share of the one over all."""
        return Part(self.bar, label) if self.bar is not None else Bar(label, total, show=comm.world().first)

    def part(self, label: str) -> Bar | None:
        """A run's share of the bar over all; None where it shows its own."""
        return Part(self.bar, label) if self.bar is not None else None

    def say(self, text: str) -> None:
        if comm.world().first:
            console.print(text)

    @contextlib.contextmanager
    def computing(self, run: runs.Run, name: str) -> Iterator[bool]:
        """Hold a run's folder, linked as `run_dir/name`, and keep its status. Gives whether there is work to do:
        a finished run is not done again, also when it was finished by somebody else while this process waited."""
        with contextlib.ExitStack() as stack:
            comm.on_first(lambda: self._enter(stack, run, name))
            todo = comm.broadcast(not run.finished)
            with self.reporting(run.folder) if todo else contextlib.nullcontext():
                yield todo

    @contextlib.contextmanager
    def alone(self, stage: str) -> Iterator[None]:
        """Hold the folder of a stage that is more than one run, and keep its status.

        Raises UserError, and leaves the status alone, where the same stage of this run_dir is at work already.
        """
        folder = self.run_dir / stage
        with contextlib.ExitStack() as stack:
            comm.on_first(lambda: stack.enter_context(runs.lock(folder, str(self.run_dir.resolve()))))
            with self.reporting(folder):
                yield

    @contextlib.contextmanager
    def reporting(self, folder: Path) -> Iterator[None]:
        """Keep the `status.json` of a folder: running, then finished, preempted or failed."""
        self._status(folder, "running")
        try:
            yield
        except BaseException as error:
            preempted = isinstance(error, runs.Preempted | KeyboardInterrupt)
            with contextlib.suppress(OSError):  # a full disk is best named by the first error
                self._status(folder, "preempted" if preempted else "failed", str(comm.explain(error)))
            raise
        self._status(folder, "finished")

    def _status(self, folder: Path, state: str, message: str = "") -> None:
        # Never a collective: the other ranks may be elsewhere when an error passes through here.
        if comm.world().first:
            runs.set_status(folder, state, message=message)

    def _enter(self, stack: contextlib.ExitStack, run: runs.Run, name: str) -> None:
        if not run.finished:
            stack.enter_context(runs.lock(run.folder, str(self.run_dir.resolve())))
        if self.mirror:
            self._meet(run, self.mirror.at("runs", run.folder.name))
        if not run.finished:
            run.begin()
        files.link(self.run_dir / name, run.folder)

    @staticmethod
    def _meet(run: runs.Run, mirror: Mirror) -> None:
        """Bring what the run's second home has and this machine lacks, and the other way round."""
        run.mirror = mirror
        if not run.finished:
            run.fetch()
        if run.finished:
            run.publish()
        else:
            checkpoint.fetch(run.folder, mirror)


Result = TypeVar("Result")


def once(stage: Callable[[Session], Result]) -> Callable[[Session], Result]:
    """A stage that several others need is done at most once in a command."""

    @functools.wraps(stage)
    def run(session: Session) -> Result:
        if stage.__module__ not in session.results:
            session.results[stage.__module__] = stage(session)
        return session.results[stage.__module__]

    return run


def open_session(plain: Mapping[str, Any]) -> Session:
    """Check the composed configuration, join the processes, and claim the run folder for this configuration."""
    config = load(Config, plain)
    slurm.export_ranks()
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    place = engine.start(config.engine, config.training.precision, config.training.timeout)
    session = Session(config, plain, place)
    comm.on_first(session.tracking.check)
    if not (config.stage == "report" and sweep(session.run_dir)):
        comm.on_first(lambda: claim(session))
    return session


def sweep(run_dir: Path) -> list[Path]:
    """The finished run folders in the folder of a sweep."""
    return [path.parent for path in sorted(run_dir.glob("*/evaluation.json"))]


def identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what is computed, flat."""
    free = (*_FREE, *(f"training.{name}" for name in _FREE_TRAINING))
    return {
        key: value
        for key, value in flatten(plain).items()
        if key not in free and key.partition(".")[0] not in _FREE_GROUPS
    }


def training_identity(options: train.Options) -> dict[str, Any]:
    """The part of the training options that decides a run's result; how main runs weigh their tokens, and against
    what, is said by themselves."""
    return {key: value for key, value in asdict(options).items() if key not in (*_FREE_TRAINING, "loss_weighting")}


def claim(session: Session) -> None:
    """Write config.yaml, or refuse a run_dir that holds another configuration, naming the keys."""
    path = session.run_dir / "config.yaml"
    if path.exists():
        old = identity(redact(yaml.safe_load(path.read_text())))
        new = identity(redact(session.plain))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            lines = [f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in changed]
            raise UserError(
                f"run_dir={session.run_dir}: holds a run with another configuration\n" + "\n".join(lines) + "\n"
                "take another run_dir, or give the same configuration"
            )
    text = yaml.safe_dump(redact(dict(session.plain)), sort_keys=False, allow_unicode=True)
    files.write_bytes(path, text.encode())
