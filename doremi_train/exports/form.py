"""What an export target is: the words that its writers, its readers and the registry share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Unit = Literal["sequences", "documents"]


class Source(NamedTuple):
    """One domain for a trainer."""

    domain: str
    path: str  # where the trainer finds it; for some its name there
    weight: float  # of the trainer's draws, as a decimal; all sum to 1
    epochs: float  # passes over it in the final run


class Stage(NamedTuple):
    """A mixture, and when it begins."""

    step: int  # of the trainer, from 0
    sources: Sequence[Source]


class Format(NamedTuple):
    """An export target: all that the house knows of what one trainer reads."""

    trainer: str  # its name, and of others that read the same file
    file: str  # what the file is, or where it goes (Markdown)
    draws: Unit
    because: str  # what in the trainer's source says so
    ending: str  # of the file's name
    write: Callable[[Sequence[Source]], str]
    read: Callable[[str], Mapping[str, Any]]  # {path or domain: weight}; runs nothing
    paths: bool = True  # False: sources go by name, so export.paths is not needed
    zeros: bool = False  # whether domains without weight are written too
    # Of stages, and the sequences of a step. None: it knows one mixture for the whole run.
    write_stages: Callable[[Sequence[Stage], int], str] | None = None
    # Steps that the start of a stage must be a multiple of, from all its weights and the sequences
    # of a step.
    every: Callable[[Iterable[float], int], int] | None = None
    refuses: Callable[[Source], str | None] | None = None  # why it cannot read a source
    # What the command says beside the file, from the weights of the stages.
    tells: Callable[[Sequence[Mapping[str, float]]], list[str]] | None = None
