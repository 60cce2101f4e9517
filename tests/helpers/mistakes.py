"""Mistakes of users in a configuration, to be drawn, and what a command may answer."""

import contextlib
import copy
import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import strategies as st

from doremi_train import command
from doremi_train.config import UserError, load
from doremi_train.stages.options import Config
from helpers import keys
from helpers.bench import PLACES
from helpers.command import TINY
from helpers.configuration import compose

_CORPUS = (
    "data.root=corpus",
    "training.steps=2",
    "training.batch_size=4",
    "training.log_every=1",
    "evaluation.every=1",
)
_SELECT = ("stage=select", "selection.targets={t: [target.jsonl]}", "selection.workers=1", *_CORPUS)
_TUNE = (
    "data.root=chats",
    "finetune.model=model",
    "finetune.lora.rank=2",
    "training.sequence_length=32",
)
BASES: dict[str, tuple[str, ...]] = {
    "pipeline": _CORPUS,
    "plan": ("stage=plan", *_CORPUS),
    "prepare": ("stage=prepare", *_CORPUS),
    "reference": ("stage=reference", *_CORPUS),
    "proxy": ("stage=proxy", *_CORPUS),
    "main": ("stage=main", *_CORPUS, "mixture=natural"),
    "evaluate": (
        "stage=evaluate", *_CORPUS, "mixture=file", "mixture.weights={one: 0.5, two: 0.5}",
    ),
    "report": ("stage=report", *_CORPUS, "mixture=unimax"),
    "export": (
        "stage=export", *_CORPUS, "mixture=uniform", "export.to=megatron",
        "export.paths={one: a, two: b}",
    ),
    "swarm": ("stage=swarm", *_CORPUS, "mixture=swarm"),
    "compare": ("stage=compare", *_CORPUS, "compare.seeds=1", "compare.methods=[dro]"),
    "doge": ("stage=main", *_CORPUS, "mixture=doge"),
    "ado": ("stage=main", *_CORPUS, "mixture=ado"),
    "odm": ("stage=main", *_CORPUS, "mixture=odm"),
    "dro": ("stage=main", *_CORPUS, "mixture=dro"),
    "mixmin": ("stage=main", *_CORPUS, "mixture=mixmin"),
    "search": ("stage=main", *_CORPUS, "mixture=search"),
    "temperature": ("stage=main", *_CORPUS, "mixture=temperature"),
    "greats": (
        "stage=main", *_CORPUS, "mixture=uniform", "batch_selection=greats",
        "batch_selection.validation_sequences=2",
    ),
    "rho": ("stage=main", *_CORPUS, "mixture=uniform", "training.loss_weighting=rho"),
    "cached": ("stage=proxy", *_CORPUS, "reference.losses=cached"),
    "pretrained": (
        "stage=proxy", *_CORPUS, "reference.path=model", "data.tokenizer=tokenizer.json",
    ),
    "downstream": (
        "stage=evaluate", *_CORPUS, "mixture=natural", "downstream.tasks=[lambada]",
        "downstream.files={lambada: tasks}",
    ),
    "ngram": (*_SELECT, "selection=ngram"),
    "bm25": (*_SELECT, "selection=bm25"),
    "classifier": (*_SELECT, "selection=classifier"),
    "random": (*_SELECT, "selection=random"),
    "vocabulary": (
        "stage=vocabulary", *_CORPUS, "selection=ngram", "selection.targets={t: [target.jsonl]}",
        "vocabulary.size=300", "vocabulary.learned=300", "vocabulary.steps=2",
    ),
    "classify": (
        "stage=classify", "data.embedded=null", "classify.root=labelled", "classify.epochs=1",
        "classify.least_steps=2", "classify.folds=2", "classify.seeds=1",
        "classify.methods=[generated,imp]",
    ),
    "finetune": ("stage=finetune", *_CORPUS, *_TUNE),
    "less": (
        "stage=select", *_CORPUS, *_TUNE, "selection=less",
        "selection.targets={t: [chats/all/validation.jsonl]}", "selection.less.epochs=1",
        "selection.less.warmup=1.0",
    ),
}  # fmt: skip


@functools.cache
def _base(name: str) -> dict[str, Any]:
    return compose(*TINY, *BASES[name])


def base(name: str) -> dict[str, Any]:
    """A sound configuration, to be run on a bench."""
    return copy.deepcopy(_base(name))


@functools.cache
def all_keys() -> tuple[keys.Key, ...]:
    return tuple(keys.every_key())


NUMBERS = (
    0, -1, 1, 2, 3, 7, 10**9, 2**53 - 1, 2**63 - 1, 10**30, 0.0, -0.5, 0.5, 1.0, 1.5, 1e-300,
    1e300, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
TEXTS = (
    "",
    " ",
    "null",
    "x",
    "1",
    "none",
    "é語",
    "\u202egnp",
    "a\nb",
    "\0",
    "\ud800",
    "a" * 3000,
    "${missing}",
    "${",
    "../..",
    "-",
    "💥",
    "one",
    "t",
)
ODD = (
    None,
    True,
    False,
    [],
    [None],
    [[]],
    ["x"],
    [1],
    ["one"],
    {},
    {"": 1},
    {"unknown": 1},
    {"one": 1},
    {"one": "x"},
    {"one": None},
    {"one": {"train": ["nowhere"]}},
    {"one": []},
    {"a": {"b": [{"c": None}]}},
    {1: 2, "a": 3},
    {None: "x"},
)


def values(key: keys.Key) -> st.SearchStrategy[Any]:
    """A value for a key: of its own kind more often than of another."""
    kinds = [
        st.sampled_from(NUMBERS),
        st.sampled_from(TEXTS),
        st.sampled_from(ODD),
        st.sampled_from(PLACES),
    ]
    kinds += [st.sampled_from(PLACES).map(lambda path: [path])] * ("list" in key.takes)
    own: list[st.SearchStrategy[Any]] = []
    if key.values:
        own.append(st.sampled_from(key.values))
        own.append(st.lists(st.sampled_from(key.values), max_size=2))
    if "number" in key.takes or "integer" in key.takes:
        own.append(st.sampled_from(NUMBERS[:10] + NUMBERS[11:14]))
    if "`true`" in key.takes:
        own.append(st.booleans())
    if "mapping" in key.takes:
        inner = st.one_of(
            st.sampled_from(ODD),
            st.sampled_from(PLACES).map(lambda path: [path]),
            st.sampled_from(PLACES),
            st.sampled_from(NUMBERS),
        )
        names = st.sampled_from(["one", "two", "t", "", "a.b", "a/b", "é", "lambada", "triviaqa"])
        own.append(st.dictionaries(names, inner, max_size=3))
    return st.one_of(*kinds, *own, *own, *own) if own else st.one_of(*kinds)


def _is_large(value: Any) -> bool:
    return isinstance(value, int | float) and value >= LARGE


Change = tuple[str, Any]  # a dotted key, and its value


def loads(key: str, value: Any) -> bool:
    """Whether a value is taken where the configuration is read."""
    try:
        load(Config, changed(base("plan"), [(key, value)]))
    except UserError:
        return False
    except Exception:
        return True
    return True


LARGE = 10**6  # of what one asks for by a larger number, one may get years of work


@st.composite
def plausible(draw: Callable[..., Any], most: int = 3, large: bool = True) -> list[Change]:
    """Values that are taken where the configuration is read: what is wrong with them is found
    later. Without `large` ones no number is."""
    known = st.sampled_from([key for key in all_keys() if key.takes])
    found = []
    for key in draw(st.lists(known, min_size=1, max_size=most, unique_by=lambda key: key.name)):
        tried = draw(st.lists(values(key), min_size=4, max_size=4))
        tried = [value for value in tried if large or not _is_large(value)]
        found += [(key.name, value) for value in tried if loads(key.name, value)][:1]
    return found


@st.composite
def changes(draw: Callable[..., Any], most: int = 3) -> list[Change]:
    """One to `most` keys with other values: known ones, and now and then one that is none."""
    known = st.sampled_from(all_keys())
    found = []
    for key in draw(st.lists(known, min_size=1, max_size=most, unique_by=lambda key: key.name)):
        suffix = draw(st.sampled_from(("",) * 30 + (".more", "x")))
        found.append((key.name + suffix, draw(values(key))))
    return found


def changed(plain: dict[str, Any], mistakes: list[Change]) -> dict[str, Any]:
    """The configuration with other values, as YAML could hold them."""
    for name, value in mistakes:
        *groups, last = name.split(".")
        inner: Any = plain
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                break
        else:
            inner[last] = copy.deepcopy(value)
    return plain


# ── What a command may answer ───────────────────────────────────────────────────────


class Answer(NamedTuple):
    code: int
    message: str


def answer(plain: dict[str, Any]) -> Answer:
    """What the command makes of a configuration. Whatever would be a traceback is raised."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return Answer(*command.child(plain))


def checked(plain: dict[str, Any]) -> Answer:
    """The same without the work: what can be seen to be wrong before anything runs."""
    try:
        command.checked(plain)
    except UserError as error:
        return Answer(error.exit_code, str(error))
    return Answer(0, "")


def names_something(message: str) -> bool:
    """Whether a message names a key, or a file of the bench."""
    known = [key.name for key in all_keys()] + [*PLACES]
    return any(name in message for name in known)
