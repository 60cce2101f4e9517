"""Conventions as tests: the ladder of imports, pure methods, YAML that composes and loads, a quick
command."""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from helpers.configuration import compose

from doremi_train.config import conf_dir, flatten, load

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "doremi_train"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# What a file imports stands on a lower rung, or in its own folder.
RUNGS = {
    0: "config files console redaction",
    1: "methods model storage exports mixture",
    2: "gradients data parallel",
    3: "selection classification evaluation trackers client",
    4: "training",
    5: "reports",
    6: "stages",
    7: "command",
    8: "__main__",
}
RUNG = {part: rung for rung, parts in RUNGS.items() for part in parts.split()}
RUNG[""] = -1  # the package itself: its version
NAMES = {
    ".".join(["doremi_train", *Path(n).with_suffix("").parts]).removesuffix(".__init__"): n
    for n in MODULES
}


def part_of(module: str) -> str:
    """doremi_train.data.shards → data."""
    return ([*module.split("."), ""])[1]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, also inside functions, and by name at run time; `from a import
    b` is a.b."""
    tree = ast.parse(path.read_text())
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(
            r"doremi_train(\.\w+)+\.?", str(node.value)
        ):
            yield from [node.value.removesuffix(".")] * (id(node) not in documented)


def ours(path: Path) -> set[str]:
    """The files of the package that a file imports, as modules; a name of a module stands for the
    module."""
    found = set()
    for name in imports(path):
        if name.split(".")[0] == "doremi_train":
            module = name if name in NAMES else name.rpartition(".")[0]
            found.add(module if module in NAMES else "doremi_train")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_lower_rungs_only(name: str) -> None:
    own = part_of("doremi_train." + name.removesuffix(".py").replace("/", ".")).removeprefix(
        "__init__"
    )
    assert own in RUNG, f"{name} has no rung: add it to the ladder here and in the design"
    for other in map(part_of, ours(PACKAGE / name)):
        assert other == own or RUNG[other] < RUNG[own] or RUNG[own] == RUNG[other] == 0, (
            f"{name} imports {other}"
        )


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Every set of files that import each other, directly or through others (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            place = stack.index(node)
            if len(stack) - place > 1 or node in graph[node]:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for node in graph:
        if node not in number:
            visit(node)
    return found


def test_tests_mirror_the_tree() -> None:
    """A folder of tests is a folder of the package; what is tested at the top has no room of its
    own, or all of them."""
    rooms = {
        path.parent.relative_to(ROOT / "tests").as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    assert all((PACKAGE / room).is_dir() for room in rooms - {"benchmarks"})


def test_a_seed_of_two_digits_is_one_file_s() -> None:
    """Tests share a store: with another file's seed, a test finds runs there that it did not
    train, or not, as files are dealt to processes."""
    owners: dict[str, set[str]] = {}
    for path in ROOT.glob("tests/**/*.py"):
        for seed in re.findall(r"\bseed=(\d\d+)\b", path.read_text()):
            owners.setdefault(seed, set()).add(path.name)
    assert owners and {seed: names for seed, names in owners.items() if len(names) > 1} == {}


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles({module: ours(PACKAGE / name) for module, name in NAMES.items()}) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]


METHODS = [name for name in MODULES if name.startswith("methods/")]
PURE = (
    "annotated_types collections functools hashlib itertools lightgbm math numpy pydantic re scipy "
    "torch typing"
)


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_pure(name: str) -> None:
    for module in imports(PACKAGE / name):
        ours = module.startswith(("doremi_train.methods", "doremi_train.config"))
        assert ours or module.split(".")[0] in PURE.split(), f"{name}: {module}"
        assert not module.startswith("torch.distributed")
    calls = [
        n.func for n in ast.walk(ast.parse((PACKAGE / name).read_text())) if isinstance(n, ast.Call)
    ]
    assert "open" not in {call.id for call in calls if isinstance(call, ast.Name)}


@functools.cache
def all_keys() -> str:
    """Every key of the command, as a pattern."""
    return "|".join(map(re.escape, flatten(compose())))


def keys_said(source: str) -> list[str]:
    """Dotted keys of the command in the strings of a module, docstrings left out."""
    tree = ast.parse(source)
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    keys = all_keys()
    return [
        key
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in documented
        for key in re.findall(rf"(?<![\w.])(?:{keys})(?!\w)", str(node.value))
        if "." in key
    ]


@pytest.mark.parametrize("name", METHODS)
def test_methods_know_no_key_of_the_command(name: str) -> None:
    assert keys_said((PACKAGE / name).read_text()) == []


def test_a_key_of_the_command_would_be_found() -> None:
    said = """
def f(x):
    "Docstrings may say proxy.step_size."
    raise ValueError(f"over mixture.max_epochs={x} and " "swarm.floor, reference.losses.mean, seed")
"""
    assert keys_said(said) == ["mixture.max_epochs", "swarm.floor", "reference.losses"]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "parallel/comm.py"])
def test_collectives_are_called_in_one_place(name: str) -> None:
    path = PACKAGE / name
    assert not any(module.startswith("torch.distributed") for module in imports(path))
    assert "torch.distributed." not in path.read_text()


@pytest.mark.parametrize("name", MODULES)
def test_randomness_is_never_python_s_hash_or_a_global_generator(name: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "hash", f"{name}:{node.lineno}"
            assert not called.startswith(
                ("random.", "np.random.rand", "np.random.seed", "np.random.shuffle")
            )


def printing(source: str) -> list[str]:
    """What a module prints with, but for `doremi_train.console`: names as they are written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            aloud = re.search(r"^print$|\.print$|^warnings\.warn$|^os\.write$", called)
            found += [called] * bool(aloud)
        elif isinstance(node, ast.Attribute):
            found += re.findall(r"^sys\.(?:__)?std(?:out|err)", ast.unparse(node))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or node.names[0].name
            found += [module] * (module.split(".")[0] == "rich" and module != "rich.table")
    return found


@pytest.mark.parametrize("name", [name for name in MODULES if name != "console.py"])
def test_all_that_is_printed_is_printed_in_one_place(name: str) -> None:
    """Which knows that it is text, and without secrets."""
    assert printing((PACKAGE / name).read_text()) == []


def test_what_prints_past_that_place_would_be_found() -> None:
    source = """
import sys
import rich.markup
from rich.table import Table
from rich.console import Console
print("x", file=sys.stderr)
Console().print("x")
"""
    expected = ["Console().print", "print", "rich.console", "rich.markup", "sys.stderr"]
    assert sorted(printing(source)) == expected


PREPOSITIONS = (
    "After", "Among", "As", "At", "Before", "Beside", "Between", "By", "For", "From", "In", "Into",
    "Of", "On", "To", "Under", "With", "Within", "Without",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_begin_with_what_a_thing_is_or_does(name: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = (ast.get_docstring(node) or "").split(" ")[0]
            assert first not in PREPOSITIONS, f"{name}: {first} … {getattr(node, 'name', '')}"


def test_ways_to_a_mixture_are_hardly_told_apart_by_name() -> None:
    """A way is an entry of WAYS, and what differs is said there."""
    named = [
        f"{name}: {line.strip()}"
        for name in MODULES
        for line in (PACKAGE / name).read_text().splitlines()
        if "mixture.method" in line
    ]
    assert len(named) <= 4, "\n".join(named)


# Configuration


OPTIONS = sorted(
    f"{path.parent.relative_to(conf_dir()).as_posix()}={path.stem}"
    for path in conf_dir().rglob("*.yaml")
    if path.parent != conf_dir() and "hydra" not in path.parts
)
# Options that mean nothing alone.
NEEDS = {
    "mixture=file": ("mixture.path=weights.json",),
    "selection=embedding": ("selection.encoder=FOLDER",),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_and_loads_strictly(option: str) -> None:
    from doremi_train.stages.options import Config

    load(Config, compose(option, *NEEDS.get(option, ())))


def test_every_yaml_says_what_it_is() -> None:
    for path in conf_dir().rglob("*.yaml"):
        assert yaml.safe_load(path.read_text()), path
        assert path.parent.name == "mixture" or path.read_text().startswith("# "), (
            f"{path}: no comment on top"
        )


def test_defaults_of_the_yaml_are_those_of_the_dataclasses() -> None:
    from doremi_train.data.options import DataOptions
    from doremi_train.evaluation.losses import EvaluationOptions
    from doremi_train.methods import importance, mixmin, vocabulary
    from doremi_train.selection.options import SelectionOptions
    from doremi_train.selection.regroup.options import RegroupOptions
    from doremi_train.stages.options import (
        Classify,
        Compare,
        Config,
        Doge,
        Downstream,
        Export,
        Finetune,
        Headroom,
        Main,
        MixtureOptions,
        Online,
        Proxy,
        Reference,
        Submit,
        Swarm,
        Target,
    )
    from doremi_train.training.task import TrainingOptions

    config = load(Config, compose("mixture=doremi"))
    assert config.proxy == Proxy()
    assert (config.weighting, config.classify) == (importance.Weighting(), Classify())
    assert (config.export, config.submit, config.swarm) == (Export(), Submit(), Swarm())
    assert (config.mixmin, config.compare, config.downstream) == (
        mixmin.Options(),
        Compare(),
        Downstream(),
    )
    assert (config.doge, config.online, config.target) == (Doge(), Online(), Target())
    assert (config.finetune, config.headroom) == (Finetune(), Headroom())
    assert (config.reference, config.main, config.mixture) == (
        Reference(),
        Main(),
        MixtureOptions(),
    )
    assert (config.data, config.evaluation) == (DataOptions(), EvaluationOptions())
    assert config.regroup == RegroupOptions()
    assert (config.selection, config.vocabulary) == (SelectionOptions(), vocabulary.Options())
    paper = TrainingOptions()
    for name in (
        "schedule",
        "warmup",
        "weight_decay",
        "gradient_clip",
        "adam_betas",
        "adam_epsilon",
        "optimizer",
    ):
        assert getattr(config.training, name) == getattr(paper, name), name


def test_defaults_of_the_proxy_are_the_paper_s() -> None:
    proxy = compose("mixture=doremi")["proxy"]
    assert (proxy["step_size"], proxy["smoothing"], proxy["average_from"]) == (1.0, 1e-3, 0.0)
    assert (proxy["clip"], proxy["score"], proxy["objective"], proxy["rounds"]) == (
        "token",
        "excess",
        "weight",
        1,
    )


def test_the_paper_s_training_is_there_by_name() -> None:
    training = compose("training=paper")["training"]
    expected = {
        "steps": 200_000, "batch_size": 512, "sequence_length": 1024, "optimizer": "adafactor",
        "warmup": 0.06, "learning_rate": 1e-3, "end_learning_rate": 1e-4, "schedule": "exponential",
        "weight_decay": 1e-2, "gradient_clip": 1.0,
    }  # fmt: skip
    assert {name: training[name] for name in expected} == expected


# The command


def command(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `main` in an empty folder, then say whether torch was imported."""
    code = (
        "import sys\nfrom doremi_train.__main__ import main\ncode = 0\n"
        "try:\n    main()\nexcept SystemExit as exit:\n    code = exit.code or 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_help_is_quick_and_shows_stages_groups_and_examples(tmp_path: Path) -> None:
    from doremi_train.stages import STAGES

    done = command(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert all(stage in done.stdout for stage in STAGES)
    assert all(group in done.stdout for group in ("data:", "mixture:", "model:", "training:"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("proxy.stepsize=1", "stepsize"),
        ("model=huge", "huge"),
        ("mixture=magic", "magic"),
        ("stage=cook", "cook"),
    ],
)
def test_a_mistake_in_the_command_is_quick_and_one_message(
    tmp_path: Path, argument: str, named: str
) -> None:
    done = command(tmp_path, argument)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
