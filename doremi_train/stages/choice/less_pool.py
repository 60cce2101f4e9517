"""The pool that LESS chooses from, and the examples of the targets that it serves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from doremi_train.config import UserError, fingerprint
from doremi_train.data import chat
from doremi_train.data.chat import Encoder
from doremi_train.data.corpus.opening import BadLines, Source
from doremi_train.data.corpus.reading import records
from doremi_train.data.instructions import Instructions
from doremi_train.selection.examples import baselines
from doremi_train.selection.examples.influence import Coded
from doremi_train.stages.choice import target_files
from doremi_train.stages.session import Session

Subtask = tuple[str, str]  # of a target


class Pool(NamedTuple):
    data: Instructions
    tokens: list[Coded]  # of every example
    places: list[tuple[str, int]]  # file and line
    domains: list[str]


def gather(session: Session, data: Instructions) -> Pool:
    """The training examples, by domain, file and line."""
    counts = data.sequences("train", session.config.training.sequence_length)
    numbers = [(k, n) for k, count in enumerate(counts.tolist()) for n in range(count)]
    examples = [data.example("train", k, n) for k, n in numbers]
    tokens = [np.where(example.carries, example.ids, ~example.ids) for example in examples]
    return Pool(
        data,
        tokens,
        [data.place("train", k, n) for k, n in numbers],
        [data.domains[k] for k, _ in numbers],
    )


def serving(session: Session, encoder: Encoder) -> dict[Subtask, list[tuple[Coded, bytes]]]:
    """The examples of every subtask, and their text. Raises UserError for a target that has none to
    be used."""
    length = session.config.training.sequence_length
    served: dict[Subtask, list[tuple[Coded, bytes]]] = {}
    for name, sources in target_files.targets(session).items():
        for place, record in _records(session, sources):
            tokens = chat.coded(encoder.encode(record, place), length)
            if (tokens >= 0).any():
                served.setdefault((name, str(record.get("subtask", ""))), []).append(
                    (tokens, baselines.text(record))
                )
        if name not in {target for target, _ in served}:
            raise UserError(
                f"selection.targets.{name}: no example whose answer lies within "
                f"training.sequence_length={length}; give some, or raise it"
            )
    return served


def _records(session: Session, sources: Sequence[Source]) -> Any:
    options = target_files.text_options(session)
    for source in sources:
        for _, line, record in records(source, options, BadLines(options)):
            yield f"{source.url}, line {line}", record


def tokens_at_once(session: Session) -> int:
    return session.config.selection.less.batch_tokens or (
        512 if session.place.device.type == "cpu" else 8192
    )


def printed(served: Mapping[Subtask, Any]) -> list[Any]:
    return [
        [*subtask, fingerprint([tokens.tolist() for tokens, _ in examples])]
        for subtask, examples in served.items()
    ]
