"""Examples that stand below registries, to be run as they stand."""

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path


def registries(source: str) -> Iterator[tuple[str, int, str]]:
    """Name, line and docstring of every registry of a module: a constant that is a dict of names,
    and the string below it."""
    body = ast.parse(source).body
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("dict[str,"):
            told = below.value if isinstance(below, ast.Expr) else None
            assert isinstance(node.target, ast.Name)
            text = told.value if isinstance(told, ast.Constant) else ""
            yield node.target.id, told.lineno if told else node.lineno, str(text)


def of_registries(name: str) -> list[doctest.DocTest]:
    """The examples of every registry of the module `name`."""
    module = importlib.import_module(name)
    path = str(module.__file__)
    return [
        doctest.DocTestParser().get_doctest(text, {}, f"{name}.{registry}", path, line)
        for registry, line, text in registries(Path(path).read_text())
    ]
