"""Every key of a command with its default, the whole of them checked, and which keys decide what is
computed.

Keys that belong to one part of the work are the options of that part's own module.
"""

from collections.abc import Mapping
from dataclasses import asdict
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
from doremi_train.methods import (
    HEURISTICS,
    doge,
    doremi,
    heuristics,
    importance,
    mixmin,
    swarm,
    vocabulary,
)
from doremi_train.model.configs import ModelOptions
from doremi_train.model.lora import LoraOptions
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.selection import options as selection_options
from doremi_train.selection.options import SelectionOptions
from doremi_train.trackers import TrackingOptions
from doremi_train.training.batch_selection import BatchSelectionOptions
from doremi_train.training.task import TrainingOptions


@dataclass(frozen=True, config=STRICT)
class Reference:
    mixture: str = (
        "natural"  # α_ref: a mixture computed from sizes, or `file`, that of mixture=file
    )
    path: str | None = None  # an existing model folder instead of training one
    losses: Literal["live", "cached"] = (
        "live"  # computed with every batch, or once for all in the store, in float16
    )


@dataclass(frozen=True, config=STRICT)
class Proxy(doremi.Options):
    accumulation: Literal["exact", "lagged"] = (
        "exact"  # which α weighs the loss when a batch comes in several parts
    )
    rounds: Positive = 1
    round_tolerance: NonNegativeFloat = 1e-3  # rounds end when no weight moves by more
    seeds: Positive = 1
    match_repetition: bool = (
        False  # read as much less of every domain as the run is shorter than the final one
    )


@dataclass(frozen=True, config=STRICT)
class Doge(doge.Options):
    target_batch: Positive = (
        8  # sequences of the target that a step looks at, where target.* names one
    )


@dataclass(frozen=True, config=STRICT)
class Online:
    prior: str = "natural"  # a mixture computed from sizes: where the run begins
    floor: Fraction = 0.01  # least weight of a domain, as far as mixture.max_epochs leaves it
    warmup: Fraction = 0.05  # part of the run on the prior
    every: Positive | None = (
        None  # steps between fits of ado, and changes of dro; null: a 50th of the run
    )
    step_size: NonNegativeFloat = 1.0  # η of dro
    target_losses: dict[str, PositiveFloat] | None = (
        None  # of dro, nats per token; null: those of the reference
    )


@dataclass(frozen=True, config=STRICT)
class Target:
    files: tuple[str, ...] | None = None  # paths, globs or URLs
    domains: tuple[str, ...] | None = (
        None  # or the validation text of these, apart from what is evaluated
    )
    sequences: Positive = 64


@dataclass(frozen=True, config=STRICT)
class Swarm(swarm.Options):
    prior: str = (
        "natural"  # a mixture computed from sizes: where draws lie around, and what λ pulls towards
    )
    rounds: Positive = 1  # of draws; from the second on where the fit expects low losses
    candidates: Positive = 2  # proposals that are trained, each next one nearer to the prior
    reuse: bool = True  # fit also the runs in the store that differ in their mixture only
    frozen: str | None = (
        None  # a weights.json, whose domains keep their proportions among themselves
    )


@dataclass(frozen=True, config=STRICT)
class MixtureOptions(heuristics.Options):
    method: str = "doremi"
    path: str | None = None  # of method `file`
    format: str | None = None  # of that file, where it is a trainer's
    weights: dict[str, float] | None = None  # of method `file`, instead of one
    normalize: bool = False  # accept weights that do not sum to 1

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
    model: str | None = None  # a preset; null: the proxy's
    steps: Positive | None = None  # null: training.steps
    tokens: Positive | None = (
        None  # of the final run this mixture is for; null: what main.steps makes
    )
    comparisons: tuple[str, ...] | None = (
        None  # trained beside it at its size; null: see Config.comparisons
    )


Method = Literal["generated", "real", "both", "focal", "quality", "filter", "imp", "dimp"]


@dataclass(frozen=True, config=STRICT)
class Classify(ClassifierOptions):
    root: str | None = (
        None  # a folder with generated.*, real.*, test.* and maybe validation.*: .jsonl, .parquet or .csv
    )
    validation_fraction: Fraction = (
        0.2  # of the real examples of every label, where there is no validation file
    )
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
    baselines: tuple[str, ...] = (
        "natural",
        "uniform",
        "unimax",
    )  # longer by what small runs cost, and as long
    search: bool = True  # random search with as many small runs too
    seeds: Positive = 3  # end to end: each derives the weights anew


@dataclass(frozen=True, config=STRICT)
class Finetune:
    model: str | None = (
        None  # local transformers folder with its tokeniser, or a model folder of an earlier run
    )
    lora: LoraOptions = LoraOptions()


@dataclass(frozen=True, config=STRICT)
class Downstream:
    tasks: tuple[str, ...] = ()  # of downstream.FORMS
    files: dict[str, str] | None = (
        None  # {task: folder with test.jsonl and train.jsonl}; cloze needs none
    )
    examples: Positive = 200  # of each, at most


@dataclass(frozen=True, config=STRICT)
class Export:
    to: str | None = None  # a trainer: a key of exports.FORMATS
    path: str | None = None  # of the file; null: in run_dir/export
    paths: dict[str, str] | None = None  # where the trainer finds each domain
    unit: formats.Unit | None = None  # of its draws; null: see exports


@dataclass(frozen=True, config=STRICT)
class Submit:
    cluster: Literal["none", "local", "slurm"] = (
        "none"  # where child runs go; none: one after another in this process
    )
    parallel: Positive = 4  # at once
    timeout_minutes: Positive = (
        240  # of one Slurm job, which saves and is requeued until it is done
    )
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
    data: DataOptions
    model: ModelOptions
    training: TrainingOptions
    weighting: importance.Weighting
    engine: EngineOptions
    evaluation: EvaluationOptions
    reference: Reference
    proxy: Proxy
    doge: Doge
    online: Online
    mixmin: mixmin.Options
    target: Target
    swarm: Swarm
    mixture: MixtureOptions
    main: Main
    selection: SelectionOptions
    vocabulary: vocabulary.Options
    batch_selection: BatchSelectionOptions
    classify: Classify
    compare: Compare
    finetune: Finetune
    downstream: Downstream
    export: Export
    submit: Submit
    tracking: TrackingOptions

    def __post_init__(self) -> None:
        if (
            not self.run_dir.strip()
        ):  # would be the current folder, and this is most likely an unset variable
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
        for name in self.comparisons:
            one_of("main.comparisons", name, ["baseline", *HEURISTICS])
        if self.reference.mixture == "file" and (
            not self.mixture.given or self.mixture.format is not None
        ):
            raise UserError(
                "reference.mixture=file: is the weights.json or the weights of mixture=file; write "
                "mixture=file mixture.path=weights.json, without mixture.format"
            )
        for name in self.downstream.tasks:
            one_of("downstream.tasks", name, list(downstream.FORMS))
            if name != "cloze" and name not in (self.downstream.files or {}):
                raise UserError(
                    f"downstream.tasks: {name} reads test.jsonl and train.jsonl of a folder of "
                    f"yours; give it as downstream.files={{{name}: FOLDER}}"
                )
        if self.downstream.tasks:
            downstream.require()
        for name in self.compare.baselines:
            one_of("compare.baselines", name, list(HEURISTICS))
        if self.export.to is not None or self.stage == "export":
            one_of("export.to", str(self.export.to), list(formats.FORMATS))

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


def one_of(key: str, value: str, allowed: list[str]) -> None:
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


def identity(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that decides what is computed, flat."""
    free = (*_FREE, *(f"training.{name}" for name in _FREE_TRAINING))
    return {
        key: value
        for key, value in flatten(plain).items()
        if key not in free and key.partition(".")[0] not in _FREE_GROUPS
    }


def training_identity(options: TrainingOptions) -> dict[str, Any]:
    """The part of the training options that decides a run's result; how main runs weigh their
    tokens, and against what, is said by themselves."""
    return {
        key: value
        for key, value in asdict(options).items()
        if key not in (*_FREE_TRAINING, "loss_weighting")
    }
