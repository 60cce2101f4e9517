"""The keys of the command, as the options dataclasses say them: the docstring below a field is the
one place where a key is explained. docs/keys.md and the comments of conf/ are made from it.
"""

import ast
import copy
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import annotated_types
import yaml

from doremi_train.config import UserError, load
from doremi_train.stages import STAGES
from doremi_train.stages.mixtures import check
from doremi_train.stages.options import Config
from helpers.configuration import compose


class Key(NamedTuple):
    """A key of the command, or a group of them."""

    name: str  # dotted
    takes: str  # what may be given, as a user reads it; of a group nothing
    values: tuple[str, ...]  # where only these may be given
    default: str  # of `doremi-train` without arguments, as YAML
    doc: str

    @property
    def comment(self) -> str:
        """What stands beside the key in YAML: the values, and the first sentence, begun in lower
        case and without its full stop."""
        first = re.split(r"\.\s+(?=\S)", self.doc)[0].removesuffix(".")
        word = first.split()[0]
        if word[1:] == word[1:].lower():
            first = first[0].lower() + first[1:]
        return "; ".join(filter(None, [" | ".join(self.values), first]))


@functools.cache
def documented(cls: type) -> dict[str, str]:
    """{field: the docstring below it, on one line} of a class, inherited fields among them."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(below.value, ast.Constant)
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def every_key() -> list[Key]:
    """Every key in the order of the configuration; a group stands before its own."""
    return list(_keys(Config, "", _defaults()))


@functools.cache
def _defaults() -> dict[str, Any]:
    return compose()


def _keys(cls: type, prefix: str, defaults: Any) -> Iterator[Key]:
    """`defaults`: the composed values of this part; what is not among them has the field's own."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        doc = documented(cls).get(field.name, "")
        if is_dataclass(kind):
            yield Key(name, "", (), "", doc)
            yield from _keys(kind, f"{name}.", defaults.get(field.name, {}))
            continue
        default = defaults.get(field.name, field.default)
        assert default is not MISSING, name
        values = _literals(kind) or registered(name, kind)
        shown = yaml.safe_dump(
            _plain(default),
            default_flow_style=True,
            sort_keys=False,
            allow_unicode=True,
            width=10**6,
        )
        yield Key(name, takes(kind, values), values, shown.removesuffix("...\n").strip(), doc)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# Types


def takes(kind: Any, values: tuple[str, ...] = ()) -> str:
    """A type as a user reads it; `values` are all that a text may be."""
    if get_origin(kind) in (types.UnionType, Union):
        parts = get_args(kind)
        choices = tuple(
            one for part in parts if get_origin(part) is Literal for one in get_args(part)
        )
        said = [takes(Literal[choices])] if choices else []
        said += [
            takes(part, values)
            for part in parts
            if get_origin(part) is not Literal and part is not types.NoneType
        ]
        return " or ".join([*said, *["`null`"] * (types.NoneType in parts)])
    if get_origin(kind) is Annotated:
        base, *bounds = get_args(kind)
        return " ".join([takes(base), " and ".join(filter(None, map(_bound, bounds)))]).strip()
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        one, more = get_args(kind)
        return f"list of {'' if more is Ellipsis else '2: '}{takes(one, values)}"
    if get_origin(kind) is dict:
        return f"mapping to {takes(get_args(kind)[1])}"
    if is_dataclass(kind):
        return f"{{{', '.join(field.name for field in fields(kind))}}}"
    if kind is str and values:
        return ", ".join(f"`{value}`" for value in values)
    names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", Any: "anything"}
    return names[kind]


def _bound(bound: Any) -> str:
    signs = {
        annotated_types.Gt: ("gt", ">"), annotated_types.Ge: ("ge", "≥"),
        annotated_types.Lt: ("lt", "<"), annotated_types.Le: ("le", "≤"),
    }  # fmt: skip
    if type(bound) not in signs:
        return ""
    name, sign = signs[type(bound)]
    return f"{sign} {getattr(bound, name)}"


def _literals(kind: Any) -> tuple[str, ...]:
    """All values of a type that has no others but null; a list of such has them too."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) is tuple:
        return _literals(get_args(kind)[0])
    if get_origin(kind) in (types.UnionType, Union):
        parts = [_literals(part) for part in get_args(kind) if part is not types.NoneType]
        return tuple(value for part in parts for value in part) if all(parts) else ()
    return ()


def registered(name: str, kind: Any) -> tuple[str, ...]:
    """Names of the registry that a key of text takes an entry of: what the command itself answers
    to a name that no registry has."""
    if name == "stage":
        return tuple(STAGES)
    text = [part for part in (str, tuple[str, ...]) if part in (kind, *get_args(kind))]
    if not text:
        return ()
    values = copy.deepcopy(_defaults())
    *parts, last = name.split(".")
    inner = functools.reduce(lambda part, key: part.setdefault(key, {}), parts, values)
    inner[last] = "?" if text == [str] else ["?"]
    try:
        check(load(Config, values))
    except UserError as error:
        found = re.search(r"=\?: unknown; allowed: (.+)$", str(error))
        return tuple(found[1].split(", ")) if found else ()
    return ()


# Comments of YAML


WIDTH = 100
_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):(?P<value>.*?)(?P<comment> +# .*)?")


def commented(text: str, prefix: str, known: dict[str, Key], everywhere: bool) -> str:
    """YAML with the comment of every key as its field says it: beside the key, or above it where
    the line would be too long.

    `prefix`: of its keys, such as `data.`. With `everywhere` false only keys that have a comment
    get one. The lines of comment on top of a file are its own.
    """
    lines = text.splitlines()
    top = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    new, above = lines[:top], list[str]()
    path: list[tuple[int, str]] = []  # (indent, key) from the outermost
    for line in lines[top:]:
        if line.lstrip().startswith("# "):
            above.append(line)
            continue
        match = _LINE.fullmatch(line)
        if match:
            indent = len(match["indent"])
            path = [(depth, key) for depth, key in path if depth < indent] + [
                (indent, match["key"])
            ]
        key = known.get(prefix + ".".join(key for _, key in path)) if match else None
        if key is None or not (everywhere or above or match["comment"]):
            new += [*above, line]
        else:
            bare = f"{match['indent']}{match['key']}:{match['value'].rstrip()}"
            beside = f"{bare} # {key.comment}"
            if len(beside) <= WIDTH:
                new.append(beside)
            else:
                if len(new) == top and top:
                    new.append("")  # or it would be of the top
                new += textwrap.wrap(
                    key.comment, WIDTH, initial_indent=f"{match['indent']}# ",
                    subsequent_indent=f"{match['indent']}# ",
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
                new.append(bare)
        above = []
    return "\n".join([*new, *above]) + "\n"
