"""Options of stage=regroup."""

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Positive, UserError
from doremi_train.methods.clusters import DIMENSIONS


@dataclass(frozen=True, config=STRICT)
class RegroupOptions:
    domains: Positive = 16
    """Domains K that are made, or with within=domain of each given one."""

    fine: Positive = 256
    """Fine clusters that are merged to them; of a small sample a quarter of its documents, but at
    least 16."""

    least_tokens: Positive | None = None
    """Words that a domain has at least; null: a tenth of an equal share."""

    within: Literal["corpus", "domain"] = "corpus"
    """Whether domains are made of all text, or each given domain is split by itself."""

    levels: Annotated[int, Ge(1), Le(20)] = 1
    """Levels of quality that each domain is divided into, by likeness to good, with equally many
    words each."""

    good: tuple[str, ...] = ()
    """Paths, globs or URLs of good text, for levels."""

    model: str | None = None
    """Folder that stage=regroup wrote, run_dir/regroup: documents go to its domains, and none are
    found anew; null: they are found."""

    sample: Positive = 100_000
    """Different documents that the clusters are found on, at most."""

    starts: Annotated[int, Ge(1), Le(100)] = 3
    """Starts of k-means, of which the best is taken; the one after it tells how stable it is."""

    dimensions: Annotated[int, Ge(8), Le(DIMENSIONS)] = 512
    """Numbers D of a document's vector."""

    encoder: str | None = None
    """A local transformers folder of a sentence encoder, by which documents are compared in the
    place of their words; null: by words, which is many times faster."""

    engine: Literal["processes", "ray", "slurm"] = "processes"
    """Where it is computed; slurm: an array, as submit says."""

    workers: Positive | None = None
    """Workers at once; null: one a core, what the Ray cluster has, submit.parallel."""

    def __post_init__(self) -> None:
        if self.domains > self.fine:
            raise UserError(
                f"regroup.fine={self.fine}: less than regroup.domains={self.domains}, which are "
                "merged of them; raise it"
            )
        if (self.levels > 1) != bool(self.good) and self.model is None:
            raise UserError(
                f"regroup.levels={self.levels}, regroup.good={list(self.good)}: levels are by "
                "likeness to good text; give both, such as regroup.levels=3 "
                "'regroup.good=[good/*.jsonl]', or neither"
            )
        if self.model is not None and self.good:
            raise UserError(
                f"regroup.model={self.model}: its levels are those of the good text it was made "
                "with; remove regroup.good"
            )
