"""Options of the data: where text comes from and how it becomes tokens."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.dataclasses import dataclass

from doremi_train.config import STRICT, Count, Positive


@dataclass(frozen=True, config=STRICT)
class Split:
    """Files of one domain: globs, paths or fsspec URLs."""

    train: tuple[str, ...]
    """Paths, globs or fsspec URLs."""

    validation: tuple[str, ...] = ()
    """The same; empty: split off by a hash of the text."""


@dataclass(frozen=True, config=STRICT)
class DataOptions:
    """Exactly one source is read: `root`, else `domains`, else `files` split by `domain_key`, else
    `embedded`."""

    embedded: Literal["installed", "planted"] | None = "installed"
    """Text that comes with this machine, or is generated with known faults, where no other source
    is given."""

    home: str | None = None
    """Folder or URL of a public corpus, for data=pile, redpajama and the like."""

    root: str | None = None
    """Folder in which each sub-folder is a domain, with files train* and optionally validation*."""

    domains: dict[str, Split] | None = None
    """Files of every domain, {name: {train: [path, glob or URL], validation: […]}}. Without
    validation it is split off by a hash of the text."""

    files: tuple[str, ...] | None = None
    """Files of one stream, split by domain_key."""

    domain_key: str | None = None
    """Dotted key of a record's domain, such as meta.pile_set_name."""

    text_key: str = "text"
    """Dotted key of a record's text."""

    tokenizer: str = "train"
    """A tokenizer.json, a local transformers folder, or train, which learns one; with start.* it is
    then that of the model."""

    vocabulary_size: Annotated[int, Ge(257), Le(10_000_000)] = 1024
    """Tokens of a learned tokeniser, 256 bytes and the end of document among them."""

    tokenizer_sample: Positive = 10_000_000
    """Characters that a learned tokeniser sees, shared evenly by the domains."""

    end_of_document: str | None = None
    """Token that ends a document; null: found by itself in the usual tokenisers."""

    only: tuple[str, ...] | None = None
    """Domains that take part, as in [code, web]; null: all. They are not prepared anew, and of the
    others nothing is required."""

    least_tokens: Count = 0
    """Training tokens that a domain has at least; those with fewer are left out, before anything is
    required of them."""

    rare_into: Annotated[str, MinLen(1)] | None = None
    """Domain into which those of fewer than least_tokens are poured, such as other; null: they are
    left out. It is prepared anew."""

    selection: str | None = None
    """A sidecar.parquet of stage=select, whose choice alone is training data, or of stage=regroup,
    whose domains take the place of those given; null: all is, by the given ones."""

    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.03
    """Part of the documents that validates, where no validation files are given."""

    max_bad_lines: Count = 0
    """Broken JSON lines, and records without text or domain, that are skipped and counted before
    the run stops."""

    max_unwritable: Annotated[float, Ge(0), Le(1)] | None = 0.1
    """Part of a domain's text that the tokeniser may be unable to write, by unknown tokens or
    dropped characters, before the run stops; null: it never does."""

    allow_pipe: bool = False
    """Whether pipe: URLs may run shell commands. It is for data lists that you wrote yourself."""

    member_tokens: Positive = 1_000_000
    """Tokens of one array in a shard, about."""

    members_per_shard: Positive = 16
    """Arrays of a shard."""
