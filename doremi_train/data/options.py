"""Options of the data: where text comes from and how it becomes tokens."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Count, Positive


@dataclass(frozen=True, config=STRICT)
class Split:
    """Files of one domain: globs, paths or fsspec URLs."""

    train: tuple[str, ...]
    validation: tuple[str, ...] = ()  # empty: split off by hash of the text


@dataclass(frozen=True, config=STRICT)
class DataOptions:
    """Exactly one source is read: `root`, else `domains`, else `files` split by `domain_key`, else
    `embedded`."""

    embedded: Literal["installed", "planted"] | None = "installed"
    home: str | None = (
        None  # folder or URL of a public corpus, for its ready configuration (conf/data)
    )
    root: str | None = (
        None  # each sub-folder is a domain with train* and optionally validation* files
    )
    domains: dict[str, Split] | None = None
    files: tuple[str, ...] | None = None  # one stream; the domain of a record is its `domain_key`
    domain_key: str | None = None  # dotted path, such as meta.pile_set_name
    text_key: str = "text"  # dotted path
    tokenizer: str = (
        "train"  # a tokenizer.json, a local transformers folder, or `train` to learn one
    )
    vocabulary_size: Annotated[int, Ge(257)] = (
        1024  # of a learned tokeniser: 256 bytes and the end of document at least
    )
    tokenizer_sample: Positive = (
        10_000_000  # characters a learned tokeniser sees, shared evenly by the domains
    )
    end_of_document: str | None = (
        None  # token that ends a document; found by itself in the usual tokenisers
    )
    only: tuple[str, ...] | None = None  # domains that take part; null: all. Not prepared anew
    selection: str | None = None  # a sidecar of stage=select: only what it chose is training data
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = (
        0.03  # of documents, where no validation files are given
    )
    max_bad_lines: Count = 0  # broken JSON lines skipped and counted before the run stops
    allow_pipe: bool = (
        False  # `pipe:` URLs run a shell command: only for data lists you wrote yourself
    )
    member_tokens: Positive = 1_000_000  # tokens of one array in a shard, about
    members_per_shard: Positive = 16
