"""Strict loading of options: Hydra composes, pydantic checks, and a mistake becomes one readable
message."""

import contextlib
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Lt

from doremi_train.redaction import redact

if TYPE_CHECKING:
    from pydantic import ConfigDict

# Of every options dataclass. Without pydantic, of which `--help` and a wrong key need nothing.
STRICT: "ConfigDict" = {"extra": "forbid", "strict": True}


class Finite:
    """A float that is neither infinite nor NaN, in pydantic's Annotated types."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(source) | {"allow_inf_nan": False}


class Exact:
    """An integer below 2⁵³, in pydantic's Annotated types: any reader of JSON has it exactly, and
    sums and products of what is counted stay within 64 bits."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler(source) | {"lt": 2**53}


Positive = Annotated[int, Gt(0), Exact()]
Count = Annotated[int, Ge(0), Exact()]
PositiveFloat = Annotated[float, Gt(0), Finite()]
NonNegativeFloat = Annotated[float, Ge(0), Finite()]
Fraction = Annotated[float, Ge(0), Lt(1)]  # [0, 1)

T = TypeVar("T")


class UserError(Exception):
    """A mistake in the configuration or the data: printed without traceback, exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        message = redact(message)
        # The key stands at the beginning and the remedy at the end: what is cut is a value.
        cut = f"{message[:3000]} … {message[-1000:]}"
        super().__init__(message if len(message) <= len(cut) else cut)


class Refused(Exception):
    """What an outside library says of a user's input, in one line."""


@contextlib.contextmanager
def judging() -> Iterator[None]:
    """The one guard around a library of others that judges what a user gave: whatever it raises,
    panics of Rust among it, is raised as Refused. Running out of memory is no judgement."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, UserError):
        raise
    except BaseException as error:  # libraries fail in many ways, and a panic is no Exception
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        cause, kind = " ".join(str(error).split()), type(error).__name__
        if isinstance(error, KeyError | AttributeError | IndexError | AssertionError):
            cause = f"{kind}: {cause}" if cause else kind
        raise Refused(cause[:400] or kind) from None


@contextlib.contextmanager
def judged(given: str, remedy: str, by: str = "transformers") -> Iterator[None]:
    """Judge, and raise a UserError that names `given` (key and value), the cause, the remedy."""
    try:
        with judging():
            yield
    except Refused as refused:
        raise UserError(f"{given}: {by} refuses it: {refused}; {remedy}") from None


def listed(names: Iterable[Any], most: int = 20) -> str:
    """The first of the sorted names for a message, each of them cut; none is said in a word."""
    return ", ".join(f"{name!s:.80}" for name in sorted(names, key=str)[:most]) or "none"


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

    _refuse_half_characters(values, key)
    try:
        # JSON mode: lists from YAML become tuples, everything else stays strict (no "3" for 3).
        return TypeAdapter(cls).validate_json(json.dumps(values))
    except ValidationError as error:
        # Where a value may be one thing or another, all that is wrong with it.
        lines: dict[str, dict[str, None]] = {}
        for entry in error.errors():
            given, said = _explain(entry, key, values)
            lines.setdefault(given, {})[said] = None
        raise UserError(
            "\n".join(given + "; or: ".join(said) for given, said in lines.items())
        ) from None


def _refuse_half_characters(values: Mapping[str, Any], key: str) -> None:
    """Refuse halves of a surrogate pair, which stand for bytes of a command line that are no UTF-8,
    and which no file of results could hold."""
    for name, value in flatten(values, f"{key}." if key else "").items():
        try:
            f"{name}{value}".encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{ascii(name)[1:-1]}={value!a}: holds bytes that are no UTF-8; set the "
                "terminal to UTF-8, or rename the file"
            ) from None


# What is a mapping by names of the user's, and may be given as a file of JSON or YAML.
MAPPINGS = (
    "data.domains", "mixture.weights", "online.target_losses", "selection.targets",
    "selection.documents", "selection.tokens", "selection.fraction", "downstream.files",
    "export.paths", "fit.tokens", "objective.metrics", "objective.guard",
)  # fmt: skip


def read_mappings(plain: dict[str, Any]) -> dict[str, Any]:
    """The same configuration, with the content of the files that stand for mappings. Raises
    UserError for a file that holds none."""
    read = {key: dict(part) if isinstance(part, Mapping) else part for key, part in plain.items()}
    for name in MAPPINGS:
        group, _, key = name.partition(".")
        values = read.get(group)
        path = values.get(key) if isinstance(values, dict) else None
        if isinstance(path, str) and path.endswith((".json", *YAML)):
            remedy = 'give a file of {"NAME": VALUE, …}, or the mapping itself'
            read[group][key] = read_object(Path(path), f"{name}={path}", remedy)
    return read


YAML = (".yaml", ".yml")


def read_object(path: Path, given: str, remedy: str) -> dict[str, Any]:
    """The JSON object in a file of a user's, or the mapping of a YAML file. Raises UserError that
    names `given`, the cause and the remedy where there is none."""
    return read_hashed(path, given, remedy)[0]


def read_hashed(path: Path, given: str, remedy: str) -> tuple[dict[str, Any], str]:
    """The same, and the SHA-256 of the bytes that it was read from."""
    form = "YAML" if path.suffix in YAML else "JSON"
    try:
        with judging():
            text = path.read_bytes()
            content = _read_yaml(text) if form == "YAML" else json.loads(text)
    except Refused as refused:
        cause = f"not a {form} file that can be read ({refused})"
        raise UserError(f"{given}: {cause}; {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{given}: must hold a JSON object, not {content!r:.50}; {remedy}")
    for name in content:
        if not isinstance(name, str):
            raise UserError(f"{given}: the name {name!r} is no text; write it in quotes")
    return content, hashlib.sha256(text).hexdigest()


def _read_yaml(text: bytes) -> Any:
    import yaml

    return yaml.safe_load(text)


def override(key: str, values: Mapping[str, str]) -> str:
    """A mapping as it is written in a shell, for a hint; or how to give it as a file where Hydra's
    grammar cannot write a name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    pairs = ", ".join(
        re.sub(r"([\\()\[\]{}:=,])", r"\\\1", name) + f": {_word(value)}"
        for name, value in values.items()
    )
    text = f"{key}={{{pairs}}}"
    try:
        understood = OverridesParser.create().parse_override(text).value() == dict(values)
    except HydraException:
        understood = False
    if understood and "${" not in text:  # which stands for another key
        return shlex.quote(text)
    file = f"{key.rpartition('.')[2]}.json"
    return f"{key}={file}, a file with {json.dumps(dict(values), ensure_ascii=False)}"


def _word(value: str) -> str:
    if re.fullmatch(r"[A-Za-z/.][\w/.\-]*", value, re.ASCII):
        return value
    return '"' + re.sub(r"(\\*)(\"|$)", r"\1\1\\\2", value).removesuffix("\\") + '"'


def _explain(entry: Any, key: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """What was given, and what is wrong with it."""
    where = ".".join([key] * bool(key) + _place(entry["loc"], values))
    if entry["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        said = "unknown key; remove it, or see `doremi-train --help` for the keys that exist"
        return f"{where}: ", said
    missing = entry["type"] in ("missing", "missing_argument")
    if missing and not isinstance(entry["loc"][-1], int):
        return f"{where}: ", f"missing; give it as {where}=…"
    shown = repr(entry["input"])
    shown = shown if len(shown) <= 300 else f"{shown[:300]}…"
    few = "too few values; its default has as many as it takes"
    return f"{where}={shown}: ", few if missing else entry["msg"]


def _place(location: Iterable[Any], values: Any) -> list[str]:
    """Parts of the key at a location of pydantic's, which also has the names of types that a value
    may be of."""
    parts: list[str] = []
    for part in location:
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:  # the name of a type, or an element that is missing
            continue
        parts.append(str(part))
    return parts


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
