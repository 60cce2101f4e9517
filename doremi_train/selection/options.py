"""Options of document selection: conf/selection."""

from typing import Annotated, Literal

from annotated_types import Gt, Le
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Count, Fraction, NonNegativeFloat, Positive, UserError
from doremi_train.methods import less

# Made in `selection.documents.registry` (extra `select`).
METHODS = ("ngram", "random", "bm25", "classifier", "embedding")

Share = Annotated[float, Gt(0), Le(1)]
Baseline = Literal["random", "bm25", "ngram", "rds", "rds_plus"]


@dataclass(frozen=True, config=STRICT)
class Less(less.Options):
    """Options of method `less`, which chooses examples for stage=finetune."""

    warmup: Share = 0.05
    """Part of the pool that the scoring model is trained on first."""

    epochs: Positive = 4
    """Epochs of the warm-up, each of which leaves a checkpoint."""

    checkpoints: tuple[str, ...] | None = None
    """Folders that transformers' Trainer left, as in [checkpoint-10, checkpoint-20]; null: a
    warm-up here."""

    features: Literal["int8", "float16"] | None = None
    """Type in which gradients are projected and kept for later targets; null: the targets are
    scored directly, exactly."""

    dimension: Positive = 8192
    """Numbers k of a projected gradient."""

    projection_seed: Count = 0
    """Seed of the projection."""

    batch_tokens: Positive | None = None
    """Tokens scored together, padding among them; null: 512 on a CPU (what its caches hold), 8192
    elsewhere."""

    baselines: tuple[Baseline, ...] = ("random", "bm25", "ngram", "rds", "rds_plus")
    """Baselines that choose beside LESS."""

    train_on: Literal["less", "all"] | Baseline = "less"
    """Whose choice stage=finetune trains on; all: the whole pool."""

    test: tuple[str, ...] | None = None
    """Files that stage=finetune then evaluates on; null: the target's own examples."""


@dataclass(frozen=True, config=STRICT)
class SelectionOptions:
    """One budget is given, as a number or as {domain: number}; none: a tenth of the tokens, or with
    less 5 % of the examples."""

    method: str = "none"
    """How text is chosen; none: all documents are training data."""

    targets: dict[str, tuple[str, ...]] | None = None
    """Text that the choice is to serve, {name: [path, glob or URL]}."""

    train: str | None = None
    """Target whose choice the run trains on; null: the only one."""

    documents: Positive | dict[str, Count] | None = None
    """Budget in documents, a number or {domain: number}; parts of long documents count as
    documents. With selection=less it is one of examples."""

    tokens: Positive | dict[str, Count] | None = None
    """Budget in tokens, a number or {domain: number}."""

    fraction: Share | dict[str, Share] | None = None
    """Budget as a part of the tokens; null, and no other budget: 0.1, with selection=less 0.05 of
    the examples."""

    within: Literal["corpus", "domain"] = "corpus"
    """Whether a number is the budget of all, or of each domain."""

    temperature: NonNegativeFloat = 0.1
    """Temperature of log w, in standard deviations of the score (exact: in nats); 0: top-k."""

    chunk: Positive | None = 1024
    """Tokens beyond which a document is cut into equal parts; null: never."""

    min_tokens: Positive = 1
    """Tokens that an eligible part has at least."""

    benchmarks: tuple[str, ...] = ()
    """Files with which nothing chosen shares 13 tokens in a row."""

    overlap: Share | None = 0.5
    """Part of the 13-grams shared with a target that makes a document a copy, which is refused;
    null: none is."""

    features: Literal["words", "tokens", "granular"] = "words"
    """What n-grams are made of."""

    tokenizer: str | None = None
    """A tokenizer.json or a local transformers folder, for features=tokens."""

    vocabulary: str | None = None
    """What stage=vocabulary wrote, for features=granular."""

    granularity: Literal["longest", "every"] = "longest"
    """Whether the longest match counts alone, or beside it that of shorter phrases (for
    features=granular)."""

    encoder: str | None = None
    """A local transformers folder of a sentence encoder, for selection=embedding."""

    exact: bool = False
    """Whether weights are those of the package data-selection. They are sums over whole documents,
    of at least 100 words."""

    buckets: Positive | None = None
    """Buckets m of hashed n-grams; null: 32768 (exact: the paper's 10000)."""

    mixing: Fraction | Literal["held_out"] = 0.0
    """Part λ of the corpus' frequencies in the target's, or held_out: by held-out likelihood."""

    write: Literal["none", "jsonl.zst", "parquet", "webdataset"] = "none"
    """Form in which the chosen text itself is written beside the sidecar."""

    engine: Literal["processes", "ray", "slurm"] = "processes"
    """Where the choice is computed; slurm: an array, as submit says."""

    workers: Positive | None = None
    """Workers at once; null: one a core, what the Ray cluster has, submit.parallel."""

    scorer_model: str | None = None
    """A local transformers folder that warms up and scores in the place of finetune.model (LESS-T).
    """

    less: Less = Less()
    """How selection=less chooses examples for stage=finetune."""

    def __post_init__(self) -> None:
        budgets = [
            name for name in ("documents", "tokens", "fraction") if getattr(self, name) is not None
        ]
        if len(budgets) > 1:
            raise UserError(
                f"selection.{' and selection.'.join(budgets)}: only one is the budget; remove the "
                "others"
            )
        if self.method == "less" and not isinstance(self.budget[1], int | float):
            raise UserError(
                f"selection.{self.budget[0]}: selection=less has one budget for all domains; give "
                "a number"
            )
        chooses = self.less.train_on in ("less", "all", *self.less.baselines)
        if not chooses:
            raise UserError(
                f"selection.less.train_on={self.less.train_on}: is not in "
                "selection.less.baselines; add it there"
            )
        needs = {
            "tokens": ("tokenizer", self.tokenizer),
            "granular": ("vocabulary", self.vocabulary),
        }
        for features, (key, given) in needs.items():
            if (self.features == features) != (given is not None):
                raise UserError(
                    f"selection.{key}={given}: goes with selection.features={features}, and only "
                    f"with it; selection.features={self.features} here"
                )
        if self.granularity == "every" and self.features != "granular":
            raise UserError(
                "selection.granularity=every: goes with selection.features=granular, and only with "
                "it"
            )
        if (self.method == "embedding") != (self.encoder is not None):
            raise UserError(
                f"selection.encoder={self.encoder}: goes with selection=embedding, and only with "
                "it; give a local transformers folder of a sentence encoder"
            )
        if self.exact and (self.features != "words" or self.mixing):
            raise UserError(
                "selection.exact=true: is words without smoothing; remove selection.features and "
                ".mixing"
            )

    @property
    def m(self) -> int:
        """Buckets. More than the paper's, for fewer n-grams that share one; the table still fits a
        core's cache."""
        return self.buckets or (10_000 if self.exact else 32_768)

    @property
    def budget(self) -> tuple[str, int | float | dict[str, int] | dict[str, float]]:
        """(documents, tokens or fraction; how many)."""
        for name in ("documents", "tokens", "fraction"):
            if (given := getattr(self, name)) is not None:
                return name, given
        return "fraction", 0.05 if self.method == "less" else 0.1
