"""Strict loading of options: Hydra composes, pydantic checks, and a mistake becomes one readable
message."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Lt

if TYPE_CHECKING:
    from pydantic import ConfigDict

# Of every options dataclass. Without pydantic, of which `--help` and a wrong key need nothing.
STRICT: "ConfigDict" = {"extra": "forbid", "strict": True}


class Finite:
    """A float that is neither infinite nor NaN, in pydantic's Annotated types."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(source) | {"allow_inf_nan": False}


Positive = Annotated[int, Gt(0)]
Count = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0), Finite()]
NonNegativeFloat = Annotated[float, Ge(0), Finite()]
Fraction = Annotated[float, Ge(0), Lt(1)]  # [0, 1)

T = TypeVar("T")


class UserError(Exception):
    """A mistake in the configuration or the data: printed without traceback, exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class Refused(Exception):
    """What an outside library says of a user's input, in one line."""


@contextmanager
def judging() -> Iterator[None]:
    """Where an outside library judges a user's input: whatever it raises, panics of Rust
    among it, is raised as Refused."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, UserError):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        lines = str(error).strip().splitlines()
        raise Refused(lines[0] if lines else type(error).__name__) from None


def in_keys(message: object, keys: Mapping[str, str]) -> str:
    """What a method says of its own arguments, in words of the command: `keys` by argument."""
    arguments = "|".join(map(re.escape, keys))
    return re.sub(rf"\b({arguments})\b", lambda argument: keys[argument[0]], str(message))


def load(cls: type[T], values: Mapping[str, Any], key: str = "") -> T:
    """Validate plain values into the options dataclass `cls`, refusing unknown keys and wrong
    types.

    `key` is where the values stand in the whole configuration, for messages. Raises UserError
    naming every wrong key, the value received and what is allowed.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        # JSON mode: lists from YAML become tuples, everything else stays strict (no "3" for 3).
        return TypeAdapter(cls).validate_json(json.dumps(values))
    except ValidationError as error:
        raise UserError(
            "\n".join(_explain(entry, key, values) for entry in error.errors())
        ) from None


def _explain(entry: Any, key: str, values: Mapping[str, Any]) -> str:
    where = ".".join([key] * bool(key) + [str(part) for part in entry["loc"]])
    if entry["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return (
            f"{where}: unknown key; remove it, or see `doremi-train --help` for the keys that exist"
        )
    if entry["type"] in ("missing", "missing_argument"):
        return f"{where}: missing; give it as {where}=…"
    return f"{where}={entry['input']!r}: {entry['msg']}"


# user:password before the host (a password may hold a slash, a port does not make one), and what a
# query signs with.
_LOGIN = re.compile(r"""(?<=://)(?:[^/\s'"]*|[^/\s'"@:]*:(?!\d+(?:/|$))[^\s'"@]*)@""")
_SIGNED = re.compile(
    r"""([?&](?:x-(?:amz|goog)-[\w-]+|[\w.-]*(?:sig|signature|token|secret|passw(?:or)?d|credentials?|api[_-]?key"""
    r"""|access[_-]?key(?:[_-]?id)?))=)[^&#\s'"]*""",
    re.IGNORECASE,
)


def redact(value: T) -> T:
    """The same text or JSON value, its URLs without passwords, keys and signatures: what may be
    written and shown."""
    if isinstance(value, str):
        return _SIGNED.sub(r"\1***", _LOGIN.sub("***@", value))  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {key: redact(entry) for key, entry in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(redact(entry) for entry in value)
    return value


def conf_dir() -> Path:
    """The folder of Hydra YAML: inside an installed wheel, beside the package in a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "conf"


def fingerprint(value: Any) -> str:
    """Content address of a JSON value: 16 hex digits, the same on every machine and Python."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat
