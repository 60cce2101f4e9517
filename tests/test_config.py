"""Strict loading: a mistake is named by its whole key, with the value received; nothing is guessed
or dropped."""

import dataclasses
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from helpers.configuration import compose
from pydantic.dataclasses import dataclass

from doremi_train.config import (
    MAPPINGS,
    STRICT,
    Count,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    UserError,
    conf_dir,
    fingerprint,
    flatten,
    in_keys,
    load,
    override,
    read_mappings,
)
from doremi_train.methods import heuristics
from doremi_train.stages.options import Config


@dataclass(frozen=True, config=STRICT)
class Inner:
    steps: Positive = 1
    rate: PositiveFloat | None = 1.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Outer:
    inner: Inner
    seed: Count = 0
    part: Fraction = 0.0
    size: NonNegativeFloat = 0.0
    flag: bool = False


def message(values: dict[str, Any], key: str = "") -> str:
    with pytest.raises(UserError) as error:
        load(Outer, values, key)
    return str(error.value)


def test_plain_values_become_options() -> None:
    loaded = load(Outer, {"inner": {"steps": 3, "rate": None, "names": ["a", "b"]}, "part": 0})
    assert loaded == Outer(inner=Inner(steps=3, rate=None, names=("a", "b")))


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"inner": {"step": 3}}, "inner.step: unknown key"),
        ({"inner": {}, "sed": 3}, "sed: unknown key"),
        ({}, "inner: missing"),
        ({"inner": {"steps": "3"}}, "inner.steps='3': "),
        ({"inner": {"steps": 3.5}}, "inner.steps=3.5: "),
        ({"inner": {"steps": True}}, "inner.steps=True: "),
        ({"inner": {"steps": None}}, "inner.steps=None: "),
        ({"inner": {"steps": 0}}, "inner.steps=0: "),
        ({"inner": {"steps": -800}}, "inner.steps=-800: "),
        ({"inner": {"rate": math.nan}}, "inner.rate=nan: "),
        ({"inner": {"rate": math.inf}}, "inner.rate=inf: "),
        ({"inner": {"rate": 0.0}}, "inner.rate=0.0: "),
        ({"inner": {"names": ["a", 1]}}, "inner.names.1=1: "),
        ({"inner": {"names": "a"}}, "inner.names='a': "),
        ({"inner": 3}, "inner=3: "),
        ({"inner": {}, "seed": -1}, "seed=-1: "),
        ({"inner": {}, "part": 1.0}, "part=1.0: "),
        ({"inner": {}, "part": math.nan}, "part=nan: "),
        ({"inner": {}, "size": -0.1}, "size=-0.1: "),
        ({"inner": {}, "size": math.inf}, "size=inf: "),
        ({"inner": {}, "flag": 1}, "flag=1: "),
    ],
)
def test_every_mistake_is_named_with_its_value(values: dict[str, Any], start: str) -> None:
    assert message(values).startswith(start)


def test_the_place_in_the_whole_configuration_comes_first() -> None:
    assert message({"inner": {"steps": 0}}, "outer").startswith("outer.inner.steps=0: ")


def test_all_mistakes_are_told_at_once() -> None:
    assert message({"inner": {"steps": 0, "x": 1}, "seed": -1}).count("\n") == 2


def test_fingerprints_know_content_and_not_order() -> None:
    assert fingerprint({"a": 1, "b": [0.1, None]}) == fingerprint({"b": [0.1, None], "a": 1})
    values: list[Any] = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": None}, {"a": [1]}, {"a": {"b": 1}}]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_fingerprints_never_change() -> None:
    """Finished runs are found by them: another value here means that every store in use is
    forgotten."""
    assert fingerprint({"α": [1, 2.5, None, True], "b": "x"}) == "7740d30f98b0006f"


def test_fingerprints_do_not_depend_on_the_hash_seed_of_python() -> None:
    code = "from doremi_train.config import fingerprint; print(fingerprint({x: x for x in 'abc'}))"
    root = str(Path(__file__).parents[1])
    outputs = {
        subprocess.check_output(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": s, "PYTHONPATH": root},
        )
        for s in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_nan_has_no_fingerprint() -> None:
    with pytest.raises(ValueError):
        fingerprint({"a": math.nan})


def test_flatten_names_leaves_by_their_whole_path() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": {}}) == {
        "a.b": 1,
        "a.c.d": [1, 2],
        "e": {},
    }


def test_the_configuration_folder_is_found() -> None:
    assert (conf_dir() / "config.yaml").is_file()


def test_what_a_method_says_is_put_into_words_of_the_command() -> None:
    keys = {"max_epochs": "mixture.max_epochs", "floor": "swarm.floor"}
    said = in_keys(ValueError("max_epochs=4 and floor=0.1 of floors, or max_epochs"), keys)
    assert said == "mixture.max_epochs=4 and swarm.floor=0.1 of floors, or mixture.max_epochs"
    with pytest.raises(ValueError) as error:
        heuristics.unimax(torch.tensor([10.0]), 100.0, heuristics.Options())
    assert in_keys(error.value, keys) == (
        "a budget of 100 tokens is more than mixture.max_epochs=4 epochs of all 10 tokens; "
        "raise it, or train for fewer tokens"
    )


# ── Mappings by names of the user's ─────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "as_file"),
    [
        ("Pile-CC", False), ("Wikipedia (en)", False), ("a:b", False), ("[x]", False),
        ("français", True), ("語", True), ("1", True), ("null", True), ("it's", True),
        ("${seed}", True),
    ],
)  # fmt: skip
def test_a_hint_is_accepted_as_it_is_printed(name: str, as_file: bool, tmp_path: Path) -> None:
    values = {name: f"/data/{name}", "plain": "/d/1 x"}
    hint = override("export.paths", values)
    given, _, content = hint.partition(", a file with ")
    assert bool(content) == as_file, hint
    (word,) = shlex.split(given)
    if as_file:
        (tmp_path / "paths.json").write_text(content)
        word = word.replace("paths.json", str(tmp_path / "paths.json"))
    assert read_mappings(compose(word))["export"]["paths"] == values


@pytest.mark.parametrize("ending", ["yaml", "yml", "json"])
def test_a_mapping_may_be_a_file_with_any_name(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"paths.{ending}"
    path.write_text('{"français": "/d/1", "it\'s {odd}, 1": "s3://b/${x}", "語": "/d/3"}')
    values = {"français": "/d/1", "it's {odd}, 1": "s3://b/${x}", "語": "/d/3"}
    assert read_mappings(compose(f"export.paths={path}"))["export"]["paths"] == values
    if ending != "json":
        path.write_text("français: /d/1\nit's {odd}, 1: s3://b/${x}\n語: /d/3\n")
        assert read_mappings(compose(f"export.paths={path}"))["export"]["paths"] == values


def mappings(options: Any, within: str = "") -> set[str]:
    """The keys of options that may be a mapping."""
    found = set()
    for field in dataclasses.fields(options):
        parts = [field.type, *get_args(field.type)]
        if dataclasses.is_dataclass(field.type):
            found |= mappings(field.type, f"{within}{field.name}.")
        elif any(get_origin(part) is dict for part in parts):
            found.add(within + field.name)
    return found


def test_every_mapping_by_names_of_the_user_s_may_be_a_file() -> None:
    """But for those whose names Hydra can write: keys of others, and words without signs."""
    others = {"compare.files", "model.config", "submit.extra"}
    assert mappings(Config) == {*MAPPINGS} | others


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("- 1", "must hold"),
        ("a: [", "not a YAML file"),
        ("1: /d/1", "the name 1 is no text; write it in quotes"),
        ("no: /d/1", "the name False is no text"),
        ("!!python/object/apply:os.getcwd []", "not a YAML file"),
    ],
)
def test_a_yaml_file_that_is_no_mapping_of_names_is_named(
    content: str, named: str, tmp_path: Path
) -> None:
    path = tmp_path / "paths.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=f"export.paths={path}: ") as error:
        read_mappings(compose(f"export.paths={path}"))
    assert named in str(error.value)


def test_a_file_for_a_mapping_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    for content in ("[1]", "{", None):
        if content is not None:
            path.write_text(content)
        with pytest.raises(UserError, match=f"mixture.weights={path}: "):
            read_mappings(compose("mixture=file", f"mixture.weights={path}"))
        path.unlink(missing_ok=True)
