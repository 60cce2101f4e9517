"""Examples of the docs and of every module and registry of methods, run as they stand there."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
from helpers.examples import of_registries, registries

from doremi_train import methods

ROOT = Path(__file__).parents[2]
MODULES = ["doremi_train.methods"] + [
    f"doremi_train.methods.{module.name}" for module in pkgutil.iter_modules(methods.__path__)
]


REGISTRIES = [test for name in MODULES for test in of_registries(name)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_the_docstrings_of_a_module_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_package_s_own_docstring_has_an_example() -> None:
    assert doctest.DocTestParser().get_examples(str(methods.__doc__))


@pytest.mark.parametrize("test", REGISTRIES, ids=lambda test: test.name)
def test_every_registry_has_an_example_that_runs(test: doctest.DocTest) -> None:
    assert test.examples, f"{test.name}: no example in the string below it"
    assert doctest.DocTestRunner().run(test).failed == 0


def test_every_registry_is_found() -> None:
    found = {test.name.removeprefix("doremi_train.methods.") for test in REGISTRIES}
    assert found >= {"ONLINE", "OBJECTIVES", "HEURISTICS", "regressors.REGRESSORS"}
    assert [*registries("A: dict[str, int] = {}\nB: dict[str, int] = {}\n'''>>> 1'''")] == [
        ("A", 1, ""),
        ("B", 3, ">>> 1"),
    ]


@pytest.mark.parametrize(("page", "least"), [("methods.md", 50), ("client.md", 20)])
def test_examples_in_the_docs_run(page: str, least: int) -> None:
    path = ROOT / "docs" / page
    outcome = doctest.testfile(str(path), module_relative=False, encoding="utf-8")
    assert outcome.failed == 0 and outcome.attempted > least
