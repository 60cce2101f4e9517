"""Options of document selection: conf/selection."""

from typing import Annotated, Literal

from annotated_types import Gt, Le
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Count, Fraction, NonNegativeFloat, Positive, UserError
from doremi_train.methods import less

METHODS = (
    "ngram",
    "random",
    "bm25",
    "classifier",
    "embedding",
)  # made in `selection.methods` (extra `select`)

Share = Annotated[float, Gt(0), Le(1)]
Baseline = Literal["random", "bm25", "ngram", "rds", "rds_plus"]


@dataclass(frozen=True, config=STRICT)
class Less(less.Options):
    """Of method `less`, which chooses examples for stage=finetune."""

    warmup: Share = 0.05  # part of the pool that the scoring model is trained on first
    epochs: Positive = 4  # of it, each of which leaves a checkpoint
    checkpoints: tuple[str, ...] | None = (
        None  # folders that transformers' Trainer left, instead of a warm-up here
    )
    features: Literal["int8", "float16"] | None = (
        None  # project and keep them; null: score the targets directly, exactly
    )
    dimension: Positive = 8192  # k, of a projected feature
    projection_seed: Count = 0
    batch_tokens: Positive | None = (
        None  # scored together, padding among them; null: 512 on a CPU, 8192 elsewhere
    )
    baselines: tuple[Baseline, ...] = (
        "random",
        "bm25",
        "ngram",
        "rds",
        "rds_plus",
    )  # that choose beside it
    train_on: Literal["less", "all"] | Baseline = (
        "less"  # whose choice stage=finetune trains on; all: the whole pool
    )
    test: tuple[str, ...] | None = (
        None  # files that stage=finetune then evaluates on; null: the target's own
    )


@dataclass(frozen=True, config=STRICT)
class SelectionOptions:
    """One budget is given, as a number or as {domain: number}; none: a tenth of the tokens, or with
    less 5 % of the examples."""

    method: str = "none"  # one of METHODS; none: all documents are training data
    targets: dict[str, tuple[str, ...]] | None = (
        None  # {name: [path, glob or URL]}: text that the choice is to serve
    )
    train: str | None = None  # whose selection this run trains on; null: that of the only target
    documents: Positive | dict[str, Count] | None = (
        None  # budget; parts of long documents count as documents
    )
    tokens: Positive | dict[str, Count] | None = None  # budget
    fraction: Share | dict[str, Share] | None = None  # budget, of the tokens
    within: Literal["corpus", "domain"] = (
        "corpus"  # a number is the budget of the corpus, or of each domain
    )
    temperature: NonNegativeFloat = (
        0.1  # of log w, in standard deviations of the score (exact: in nats); 0: top-k
    )
    chunk: Positive | None = 1024  # tokens: longer documents are cut into equal parts; null: never
    min_tokens: Positive = 1  # shorter parts are not eligible
    benchmarks: tuple[str, ...] = ()  # files: who shares 13 tokens in a row with them is refused
    overlap: Share | None = (
        0.5  # part of the 13-grams: who shares as many with a target is refused; null: nobody
    )
    features: Literal["words", "tokens", "granular"] = "words"  # of n-grams
    tokenizer: str | None = (
        None  # of features=tokens: a tokenizer.json or a local transformers folder
    )
    vocabulary: str | None = None  # of features=granular: what stage=vocabulary wrote
    granularity: Literal["longest", "every"] = (
        "longest"  # of features=granular: beside the longest match, shorter ones
    )
    encoder: str | None = None  # of method=embedding: a local transformers folder
    exact: bool = (
        False  # the published package's weights: sums over whole documents of at least 100 words
    )
    buckets: Positive | None = (
        None  # m, of hashed n-grams; null: 32 768 (exact: the paper's 10 000)
    )
    mixing: Fraction | Literal["held_out"] = (
        0.0  # λ of Jelinek-Mercer smoothing, or by held-out likelihood
    )
    write: Literal["none", "jsonl.zst", "parquet", "webdataset"] = (
        "none"  # the chosen text, beside the sidecar
    )
    engine: Literal["processes", "ray", "slurm"] = (
        "processes"  # where it is computed; slurm: an array, as submit says
    )
    workers: Positive | None = (
        None  # at once; null: one a core, what the Ray cluster has, submit.parallel
    )
    scorer_model: str | None = (
        None  # of method=less: a local transformers folder; null: finetune.model
    )
    less: Less = Less()

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
