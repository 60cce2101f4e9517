"""Every key of a command with its default, the whole of them checked, and which keys decide what is
computed.

Keys that belong to one part of the work are the options of that part's own module.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic.dataclasses import dataclass

from doremi_train.classification.models import ClassifierOptions
from doremi_train.config import (
    STRICT,
    Count,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    UserError,
    flatten,
)
from doremi_train.data.options import DataOptions
from doremi_train.evaluation import downstream
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.exports import formats
from doremi_train.exports.form import Unit
from doremi_train.methods import (
    HEURISTICS,
    doge,
    doremi,
    heuristics,
    importance,
    mixmin,
    objective,
    swarm,
    vocabulary,
)
from doremi_train.model.configs import ModelOptions
from doremi_train.model.lora import LoraOptions
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.selection import options as selection_options
from doremi_train.selection.options import SelectionOptions
from doremi_train.selection.regroup.options import RegroupOptions
from doremi_train.trackers import TrackingOptions
from doremi_train.training.batch_selection import BatchSelectionOptions
from doremi_train.training.task import TrainingOptions


@dataclass(frozen=True, config=STRICT)
class Start:
    model: str | None = None
    """Folder of a model (safetensors), with whose weights reference, proxies, swarm runs and main
    begin; it is then the shape too, and not model and main.model. null: a seed makes them."""

    reference: str | None = None
    """The same of the reference alone; null: start.model."""

    main: str | None = None
    """The same of the final model and its comparisons; null: start.model."""

    @property
    def first(self) -> tuple[str, str] | None:
        """Key and folder of one that is given."""
        return next(((key, one) for key, one in asdict(self).items() if one is not None), None)


@dataclass(frozen=True, config=STRICT)
class Reference:
    mixture: str = "natural"
    """Mixture α_ref that the reference is trained on; file: that of mixture=file."""

    path: str | None = None
    """Folder of an existing model that is the reference; null: one is trained."""

    losses: Literal["live", "cached"] = "live"
    """Whether the reference's losses are computed with every batch, or once for all and kept in the
    store in float16. The latter is for seeds, sweeps and rounds against one reference."""

    sharded: bool | None = None
    """Whether the reference, where its losses are computed, is divided among the processes; null:
    where the engine divides what is trained (fsdp2, zero3). Whole takes more memory, and nothing is
    gathered for it."""


@dataclass(frozen=True, config=STRICT)
class Proxy(doremi.Options):
    accumulation: Literal["exact", "lagged"] = "exact"
    """Which α weighs the loss when a batch comes in several parts: this step's, by a second
    forward, or that of the step before."""

    rounds: Positive = 1
    """Rounds at most, each with a reference trained on the mixture of the round before."""

    round_tolerance: NonNegativeFloat = 1e-3
    """Most that any weight moves by when rounds end."""

    seeds: Positive = 1
    """Proxies whose mean is the mixture, each with a seed of its own."""

    match_repetition: bool | None = None
    """Whether reference, proxy and small runs read so much less of a domain that they repeat it as
    the final run will; null: where main.tokens says how long that is."""


@dataclass(frozen=True, config=STRICT)
class Doge(doge.Options):
    target_batch: Positive = 8
    """Sequences of the target that a step looks at, where target.* names one."""


@dataclass(frozen=True, config=STRICT)
class Online:
    prior: str = "natural"
    """Mixture that the run begins with."""

    floor: Fraction = 0.01
    """Least weight of a domain, as far as mixture.max_epochs leaves it."""

    warmup: Fraction = 0.05
    """Part of the run that is spent on the prior."""

    every: Positive | None = None
    """Steps between fits of ado, and changes of dro; null: a 50th of the run."""

    step_size: NonNegativeFloat = 1.0
    """Step size η of dro."""

    target_losses: dict[str, PositiveFloat] | None = None
    """Target losses of dro, {domain: nats per token}; null: the reference's on validation text."""


@dataclass(frozen=True, config=STRICT)
class Target:
    files: tuple[str, ...] | None = None
    """Paths, globs or URLs of the target's text; null: see domains."""

    domains: tuple[str, ...] | None = None
    """Domains whose validation text is the target, apart from what is evaluated; null: none."""

    sequences: Positive = 64
    """Sequences that are taken of the target."""


@dataclass(frozen=True, config=STRICT)
class Swarm(swarm.Options):
    prior: str = "natural"
    """Mixture that draws lie around, and that λ pulls towards."""

    rounds: Positive = 1
    """Rounds of draws, from the second on where the fit expects low losses."""

    candidates: Positive = 2
    """Proposals that are trained, each next one nearer to the prior."""

    reuse: bool = True
    """Whether to fit also the runs in the store that differ in their mixture only."""

    frozen: str | None = None
    """A weights.json whose domains keep their proportions among themselves, when others were added,
    dropped or split; null: none."""


@dataclass(frozen=True, config=STRICT)
class MixtureOptions(heuristics.Options):
    method: str = "doremi"
    """How the mixture is found; mixture=NAME sets it."""

    path: str | None = None
    """A weights.json, or a trainer's file, for mixture=file."""

    format: str | None = None
    """Trainer whose file mixture.path is; null: it is a weights.json."""

    weights: dict[str, float] | None = None
    """Weights {domain: weight} for mixture=file, instead of a path."""

    normalize: bool = False
    """Whether weights that do not sum to 1 are accepted, and normalised."""

    def __post_init__(self) -> None:
        given = [self.path, self.weights]
        if len(given) - given.count(None) != self.given:
            raise UserError(
                f"mixture.path={self.path}, mixture.weights={self.weights}: one of "
                "them goes with mixture=file, and only with it; write mixture=file "
                "mixture.path=weights.json"
            )
        if self.format is not None:
            one_of("mixture.format", self.format, list(formats.FORMATS))
            if self.path is None:
                raise UserError(
                    f"mixture.format={self.format}: it is that of mixture.path, which is missing"
                )

    @property
    def given(self) -> bool:
        """Whether the weights are those of a file or of the command."""
        return self.method == "file"


@dataclass(frozen=True, config=STRICT)
class Main:
    model: str | None = None
    """Preset of the final model; null: the proxy's."""

    steps: Positive | None = None
    """Steps of the final model; null: training.steps."""

    tokens: Positive | None = None
    """Budget of your real final run, from which epochs are computed; null: that of main.steps."""

    comparisons: tuple[str, ...] | None = None
    """Mixtures that are trained beside the final model at its size, equal ones once; null: baseline
    (α_ref), natural and uniform."""

    mixture_file: str | None = None
    """File of a mixture that the final model follows while it trains, such as a weights.json, in
    place of the learned one; null: none."""

    mixture_every: Positive = 100
    """Steps between two readings of main.mixture_file."""


Method = Literal["generated", "real", "both", "focal", "quality", "filter", "imp", "dimp"]


@dataclass(frozen=True, config=STRICT)
class Classify(ClassifierOptions):
    root: str | None = None
    """Folder with generated.*, real.* (some hundred examples of what is wanted), test.* and maybe
    validation.*. They are .jsonl, .parquet or .csv."""

    validation_fraction: Fraction = 0.2
    """Part of the real examples of every label that validates, where there is no validation file.
    """

    text_key: str = "text"
    """Key of an example's text."""

    label_key: str = "label"
    """Key of an example's label."""

    methods: tuple[Method, ...] = get_args(Method)
    """Ways to train a classifier."""

    seeds: Positive = 4
    """Seeds of each way."""

    folds: Positive = 5
    """Parts of the generated examples, each judged by a model of the others; 1: all by one of all.
    """

    temperature: bool = True
    """Whether the checkers are scaled to examples that they were not trained on."""

    focal_power: NonNegativeFloat = 2.0
    """Power γ of the focal loss."""

    columns: str | None = None
    """Folder of what the checkers say of the generated examples; null: classify.root."""


@dataclass(frozen=True, config=STRICT)
class FitOptions:
    runs: str | tuple[str, ...] | None = None
    """A table of other people's runs, .csv, .tsv or .parquet, with columns of weights and of
    metrics; or two, as in [mixtures.csv, losses.csv], joined by their first column; or the run_dir
    of a finished swarm."""

    weights: str | tuple[str, ...] | None = None
    """Patterns of the columns that are weights, as in train_*; null: found by themselves."""

    metrics: str | tuple[str, ...] | None = None
    """Patterns of the columns that are metrics, as in *_loss; null: what is left."""

    regressor: Literal["saturating", "corrected", "log_linear", "lightgbm", "gaussian_process"] = (
        "corrected"
    )
    """What fits the metrics; corrected is the saturating law, and trees on what it leaves."""

    kl: NonNegativeFloat = 0.0
    """Pull λ of the proposal towards natural, in units of the objective per nat of KL."""

    tokens: dict[str, Positive] | None = None
    """Tokens that there are of every domain, {domain: tokens}, from which natural weights follow,
    and with main.tokens the passes over each; null: natural is the mean of the runs."""

    predict: str | None = None
    """A table of mixtures whose metrics are predicted, into fit/predictions.csv."""

    content: str | tuple[str, ...] | None = None
    """Folders of stage=regroup that counted the runs' domains and those of fit.predict, which may
    then have other names: what they hold is compared."""


@dataclass(frozen=True, config=STRICT)
class Headroom:
    runs: Positive | None = None
    """Runs beside natural, its shorter ones and uniform; null: one for each domain."""


@dataclass(frozen=True, config=STRICT)
class Compare:
    methods: tuple[str, ...] = ("doremi", "swarm")
    """Methods that are compared, values of mixture."""

    baselines: tuple[str, ...] = ("natural", "uniform", "unimax")
    """Free mixtures, trained longer by what a method's small runs cost, and as long."""

    files: dict[str, str] | None = None
    """Mixtures of yours that take part like the free ones, {name: weights.json}."""

    search: bool = True
    """Whether random search with as many small runs takes part."""

    seeds: Positive = 3
    """End-to-end seeds, each of which derives the weights anew."""


@dataclass(frozen=True, config=STRICT)
class Finetune:
    model: str | None = None
    """A local transformers folder with its tokeniser, or a model folder of an earlier run."""

    lora: LoraOptions = LoraOptions()
    """LoRA, small matrices beside frozen ones (extra `lora`)."""


@dataclass(frozen=True, config=STRICT)
class Downstream:
    tasks: tuple[str, ...] = ()
    """Tasks of the final models; cloze is of validation text."""

    files: dict[str, str] | None = None
    """Folders of the other tasks, {task: folder with test.jsonl and train.jsonl}, which may be your
    own. Their keys are in doremi_train/evaluation/downstream.py."""

    examples: Positive = 200
    """Examples of each task, at most."""


@dataclass(frozen=True, config=STRICT)
class Export:
    to: str | None = None
    """Trainer that the mixture is written for."""

    path: str | None = None
    """File that is written; null: in run_dir/export."""

    paths: dict[str, str] | None = None
    """Where the trainer finds each domain, {domain: path}, or a file of that in JSON or YAML."""

    unit: Unit | None = None
    """What the trainer draws; null: as the table in docs/export.md says."""


@dataclass(frozen=True, config=STRICT)
class Submit:
    cluster: Literal["none", "local", "slurm"] = "none"
    """Where child runs go; none: one after another in this process."""

    parallel: Positive = 4
    """Jobs at once."""

    timeout_minutes: Positive = 240
    """Minutes of a Slurm job, which saves before and is requeued until it is done."""

    nodes: Positive = 1
    """Nodes of each job."""

    tasks_per_node: Positive = 1
    """Processes of a job on each node."""

    gpus_per_node: Count = 0
    """GPUs of a job on each node."""

    cpus_per_task: Positive | None = None
    """CPU cores of each process; null: as the cluster says."""

    partition: str | None = None
    """Partition of Slurm; null: the cluster's own."""

    extra: dict[str, str | int] | None = None
    """Other options of sbatch, such as {account: mine, mem: 64G}."""


@dataclass(frozen=True, config=STRICT)
class Config:
    stage: str
    """What to do; each stage first does whatever it needs that is not finished."""

    run_dir: str
    """Folder of what the run writes."""

    store: str | None
    """Folder of token shards and content-addressed runs; null: run_dir/store. Share one between
    runs, seeds and sweeps."""

    remote: str | None
    """A second home of what is in the store, to go on elsewhere: an fsspec URL such as
    s3://bucket/doremi, or a path; null: none."""

    seed: Count
    """Seed of everything that is drawn."""

    data: DataOptions
    """Text, and how it becomes tokens."""

    model: ModelOptions
    """The model of reference and proxy, and the final one where main.model does not say otherwise.
    """

    start: Start
    """Weights that runs begin with, as continued pretraining does."""

    training: TrainingOptions
    """Training of reference, proxy and main alike."""

    weighting: importance.Weighting
    """How tokens or labels are weighed, for training.loss_weighting and stage=classify."""

    engine: EngineOptions
    """How models are spread over processes."""

    evaluation: EvaluationOptions
    """Validation loss of every model."""

    reference: Reference
    """What the proxy's excess loss is measured against."""

    proxy: Proxy
    """Proxy runs by Group DRO; mixture=doremi has the paper's settings."""

    doge: Doge
    """Small runs that learn weights by how domains' gradients agree (mixture=doge; proxy.seeds of
    them)."""

    online: Online
    """Mixtures that the main run adapts within mixture.max_epochs (mixture=ado, odm, dro)."""

    mixmin: mixmin.Options
    """A small run on each domain alone; the mixture of them that has least loss on the target
    (mixture=mixmin)."""

    target: Target
    """Text that the mixture is to serve; null: all domains alike."""

    swarm: Swarm
    """Many small runs, a fit of each validation loss, the best mixture within mixture.max_epochs
    (mixture=swarm)."""

    mixture: MixtureOptions
    """The weights that the final model is trained on."""

    main: Main
    """The final model."""

    objective: objective.Options
    """What a mixture is for: which metrics are to fall, and which must not rise."""

    headroom: Headroom
    """How much any mixture can gain on the objective, from few runs (stage=headroom)."""

    fit: FitOptions
    """A mixture from other people's runs, without data or training (stage=fit)."""

    selection: SelectionOptions
    """Choice of documents, or with selection=less of examples, that are trained on."""

    regroup: RegroupOptions
    """Domains made from the text, where the given ones are not the right ones (stage=regroup)."""

    vocabulary: vocabulary.Options
    """Tokens for selection.features=granular, from the selection's targets (stage=vocabulary)."""

    batch_selection: BatchSelectionOptions
    """Which candidates of every step the final model is trained on."""

    classify: Classify
    """Texts and labels, generated ones weighted towards a few real ones (stage=classify)."""

    compare: Compare
    """Methods against what the same FLOPs buy without them (stage=compare)."""

    finetune: Finetune
    """Fine-tuning on data.* of .jsonl lines with prompt and completion, or messages
    (stage=finetune)."""

    downstream: Downstream
    """What the final models can do, by lm-evaluation-harness (extra `eval`); may change at any
    time."""

    export: Export
    """The mixture for your trainer (stage=export); may change at any time."""

    submit: Submit
    """Child runs, such as those of proxy.seeds and of a swarm, side by side."""

    tracking: TrackingOptions
    """Where curves are shown beside the JSON lines, which are always written."""

    def __post_init__(self) -> None:
        # Would be the current folder, and this is most likely an unset variable.
        if not self.run_dir.strip():
            raise UserError(
                "run_dir='': must name a folder for what the run writes; give it as "
                "run_dir=runs/mine"
            )
        one_of("selection", self.selection.method, ["none", "less", *selection_options.METHODS])
        one_of("reference.mixture", self.reference.mixture, ["file", *HEURISTICS])
        one_of("swarm.prior", self.swarm.prior, list(HEURISTICS))
        one_of("online.prior", self.online.prior, list(HEURISTICS))
        if self.training.loss_weighting == "imp" and self.reference.path is None:
            raise UserError(
                "training.loss_weighting=imp: compares a reference of the text that is wanted with "
                "a model of this data, and without reference.path both would be trained on this "
                "data; give reference.path=…, or take dimp or rho"
            )
        if self.start.first is not None and self.main.model is not None:
            raise UserError(
                f"main.model={self.main.model}: begins with no weights, where start.* gives some; "
                "give start.main=FOLDER in its place"
            )
        if self.main.mixture_file is not None:
            self._check_mixture_file()
        for name in self.comparisons:
            one_of("main.comparisons", name, ["baseline", *HEURISTICS])
        if self.reference.mixture == "file" and (
            not self.mixture.given or self.mixture.format is not None
        ):
            raise UserError(
                "reference.mixture=file: is the weights.json or the weights of mixture=file; write "
                "mixture=file mixture.path=weights.json, without mixture.format"
            )
        for name in self.downstream.files or {}:
            if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or name == "target":
                raise UserError(
                    f"downstream.files: {name!r} cannot be the name of a task; take letters, "
                    "digits, and _ . - between them, and not target"
                )
        for name in self.downstream.tasks:
            own = list(self.downstream.files or {})
            one_of("downstream.tasks", name, list({**downstream.FORMS, **dict.fromkeys(own)}))
            if name != "cloze" and name not in (self.downstream.files or {}):
                raise UserError(
                    f"downstream.tasks: {name} reads test.jsonl and train.jsonl of a folder of "
                    f"yours; give it as 'downstream.files={{{name}: FOLDER}}'"
                )
        for name in self.compare.baselines:
            one_of("compare.baselines", name, [*HEURISTICS, "target"])
        taken = {"search", *self.compare.methods, *self.compare.baselines}
        for name in self.compare.files or {}:
            if name in taken or not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise UserError(
                    f"compare.files: {name!r} is not a name for a mixture of yours; give one of "
                    f"letters, digits and _ that is none of {', '.join(sorted(taken))}"
                )
        if not self.classify.methods:
            raise UserError(
                "classify.methods=[]: there is nothing to train; name one way or more, such as imp"
            )
        if self.export.to is not None or self.stage == "export":
            one_of("export.to", str(self.export.to), list(formats.FORMATS))

    def _check_mixture_file(self) -> None:
        given = f"main.mixture_file={self.main.mixture_file}"
        if self.training.loss_weighting != "none":
            raise UserError(
                f"{given}: training.loss_weighting={self.training.loss_weighting} weighs by one "
                "mixture for the whole run; leave one of the two out"
            )
        if self.stage == "compare":
            raise UserError(
                f"{given}: every main run of stage=compare would follow it, whatever its method; "
                "leave it out"
            )

    @property
    def comparisons(self) -> tuple[str, ...]:
        """What the final model has to beat: baseline is α_ref, and natural and uniform are never
        missing."""
        if self.main.comparisons is not None:
            return self.main.comparisons
        return (
            ("baseline", "uniform")
            if self.reference.mixture == "natural"
            else ("baseline", "natural", "uniform")
        )


def check_files(config: Config) -> None:
    """Raise UserError for files of tasks that cannot be used, before anything runs; a run that is
    finished needs them no more."""
    asked = config.downstream
    if asked.tasks:
        downstream.require()
    used = config.stage in ("pipeline", "evaluate", "report")
    if not used or (Path(config.run_dir) / "downstream.json").exists():
        return
    for name in asked.tasks:
        if name != "cloze":
            downstream.check(name, Path((asked.files or {})[name]))


def one_of(key: str, value: str, allowed: list[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: unknown; allowed: {', '.join(allowed)}")


# What may change between two commands on one run_dir: it says how to compute, not what.
_FREE = (
    "stage", "run_dir", "store", "remote", "data.max_bad_lines",
    "data.max_unwritable", "data.allow_pipe", "reference.sharded",
    "selection.engine", "selection.workers", "selection.less.batch_tokens",
    "regroup.engine", "regroup.workers",
)  # fmt: skip
_FREE_GROUPS = ("compare", "downstream", "engine", "export", "headroom", "submit", "tracking")
_FREE_TRAINING = (
    "micro_batch_size", "activation_checkpointing", "checkpoint_every", "keep_checkpoints",
    "log_every", "threads", "timeout", "snapshots",
)  # fmt: skip


def identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what is computed, flat."""
    free = (*_FREE, *(f"training.{name}" for name in _FREE_TRAINING))
    kept = ("downstream.files", "downstream.examples") if _counts_tasks(plain) else ("-",)
    return {
        key: value
        for key, value in flatten(plain).items()
        if key.startswith(kept) or (key not in free and key.partition(".")[0] not in _FREE_GROUPS)
    }


def _counts_tasks(plain: Mapping[str, Any]) -> bool:
    """Whether the objective counts tasks of downstream.*."""
    asked, tasks = plain.get("objective") or {}, plain.get("downstream") or {}
    named = {**(asked.get("metrics") or {}), **(asked.get("guard") or {})}
    return asked.get("over") == "tasks" or bool({"cloze", *(tasks.get("files") or {})} & {*named})


def default(key: str) -> Any:
    """The default of a key; None where it has none."""
    within: Any = Config
    for part in key.split("."):
        found = {one.name: one for one in fields(within)} if is_dataclass(within) else {}
        if part not in found:
            return None
        within = found[part].type if is_dataclass(found[part].type) else found[part].default
    return within


def training_identity(options: TrainingOptions) -> dict[str, Any]:
    """The part of the training options that decides a run's result; how main runs weigh their
    tokens, and against what, is said by themselves."""
    return {
        key: value
        for key, value in asdict(options).items()
        if key not in (*_FREE_TRAINING, "loss_weighting")
    }
