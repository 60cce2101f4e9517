"""Whether the processes of a launch are parts of one run: what each says of it, and what differs.

A process with another learning rate, other data or another version would train along, and its run
would stand in the store under the first one's name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from doremi_train.config import UserError, fingerprint

ERROR = "error"  # the key of a process that ends before it begins
_NAMED = 5  # processes, and keys of each, that a message names
_LENGTH = 100  # characters of a value that are said


class Differ(UserError):
    """The processes are no parts of one run."""


def statement(values: Mapping[str, Any]) -> dict[str, str]:
    """JSON values by key as a process says them to the others: a long one as its beginning, and the
    address of the whole."""
    said = {}
    for key, value in values.items():
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        said[key] = text if len(text) <= _LENGTH else f"{text[:_LENGTH]}… ({fingerprint(value)})"
    return said


def differences(statements: Sequence[Mapping[str, str]]) -> str | None:
    """A message on what other processes say otherwise than the first, by rank and key; None where
    they all say the same."""
    first, *others = statements
    found = [
        f"process {rank}: {_of_one(said, first)}"
        for rank, said in enumerate(others, 1)
        if said != first
    ]
    if not found:
        return None
    more = f"; and {len(found) - _NAMED} more processes" * (len(found) > _NAMED)
    return (
        f"the processes are no parts of one run: {'; '.join(found[:_NAMED])}{more}; start all with "
        "the same command, files and versions"
    )


def _of_one(said: Mapping[str, str], first: Mapping[str, str]) -> str:
    for one, whose in ((said, ""), (first, "the first one: ")):
        if ERROR in one:  # and nothing else: it knows no more
            return f"{whose}{one[ERROR]}"
    keys = sorted(key for key in said.keys() | first.keys() if said.get(key) != first.get(key))
    named = ", ".join(
        f"{key}={said.get(key, 'nothing')} where the first has {first.get(key, 'nothing')}"
        for key in keys[:_NAMED]
    )
    return named + f", and {len(keys) - _NAMED} more keys" * (len(keys) > _NAMED)
