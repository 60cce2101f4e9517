"""The book is true: every command of README.md and docs/ is one that would start, every link leads
somewhere, and every fault of the table has its test."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers.configuration import compose
from hydra.core.override_parser.overrides_parser import OverridesParser

from doremi_train.config import load
from doremi_train.stages import STAGES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<(?:img|source)[^>]*\bsrc(?:set)?=\"([^\"]+)\"")

# Launchers of ours → what of the words after them is for doremi-train.
SCRIPTS = {
    "launch/slurm/stage.sbatch": lambda words: words,
    "launch/slurm/pipeline.sh": lambda words: words[words.index("--") + 1 :],
    "launch/slurm/seeds.sh": lambda words: words[words.index("--") + 1 :],
}


# ── Commands ────────────────────────────────────────────────────────────────────────


def fenced(text: str) -> Iterator[str]:
    """Every command line of the ```bash blocks, its continuations joined."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        yield from filter(str.strip, block.replace("\\\n", " ").splitlines())


def overrides(line: str) -> list[str] | None:
    """What a command line gives to doremi-train; None where it does not start it."""
    words = shlex.split(line, comments=True)
    if "&&" in words:
        return overrides(shlex.join(words[len(words) - words[::-1].index("&&") :]))
    for place, word in enumerate(words):
        if Path(word).name == "doremi-train":
            return words[place + 1 :]
        if word == "doremi_train" and words[place - 1] == "-m":
            return words[place + 1 :]
        if word in SCRIPTS:
            return SCRIPTS[word](words[place + 1 :])
    return None


def jobs(given: list[str]) -> Iterator[list[str]]:
    """The overrides of each job of a sweep (-m), or of the only one."""
    words = [word for word in given if word not in ("-m", "--multirun")]
    if len(words) == len(given):
        yield words
        return
    choices = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [str(one.input_line)]
        for one in OverridesParser.create().parse_overrides(words)
    ]
    yield from map(list, itertools.product(*choices))


COMMANDS = [
    (name, line)
    for name, page in zip(NAMES, PAGES, strict=True)
    for line in fenced(page.read_text())
    if overrides(line) is not None
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{n}: {c}" for n, c in COMMANDS])
def test_a_command_of_the_book_composes_and_loads_strictly(page: str, line: str) -> None:
    from doremi_train.stages.options import Config

    for job in jobs(overrides(line) or []):
        assert load(Config, compose(*job)).stage in STAGES, job


def test_no_command_of_the_book_is_overlooked() -> None:
    """A line that names the command, and is not known to start it, would not be tested."""
    known = {line for _, line in COMMANDS}
    for page in PAGES:
        for line in fenced(page.read_text()):
            shown = " ".join(shlex.split(line, comments=True))
            named = re.search(r"(?:^|/|\s)doremi[-_]train\b|launch/slurm", shown)
            assert not named or line in known, f"{page.name}: {line}"
    assert {name for name, _ in COMMANDS} > {"README.md", "docs/cluster.md", "docs/mixtures.md"}


def test_what_the_book_launches_by_is_there() -> None:
    files = [word for _, line in COMMANDS for word in line.split() if word.startswith("launch/")]
    assert set(SCRIPTS) <= set(files)
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("start", [r"&& \.venv/bin/pytest ", r"&& \.venv/bin/doremi-train$"])
def test_the_readme_has_each_of_its_two_commands_once(start: str) -> None:
    """CI runs them as they stand there, found by these words."""
    lines = (ROOT / "README.md").read_text().splitlines()
    (line,) = (line for line in lines if re.search(start, line))
    assert line in list(fenced((ROOT / "README.md").read_text()))


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


# ── Links ───────────────────────────────────────────────────────────────────────────


def unfenced(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead, but for what stands in code."""
    text = re.sub(r"`[^`\n]*`", "", unfenced(page.read_text()))
    return [link[1] or link[2] for link in LINK.finditer(text)]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page: small letters, and no punctuation."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", unfenced(text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        numbered = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(1)))
        found.add(next(one for one in numbered if one not in found))
    return found


def dangling(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    lost = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        there = not path or (file.exists() and file.is_relative_to(ROOT))
        if not there or (anchor and anchor not in anchors(file.read_text())):
            lost.append(target)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_and_picture_of_a_page_leads_somewhere(page: Path) -> None:
    assert dangling(page) == []


def test_a_link_that_leads_nowhere_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "# A `b`, c\n[x](#a-b-c) [y](#d) `[z](none.md)` ![p](none.svg) [q](https://e.org)\n"
    )
    assert dangling(tmp_path / "page.md") == ["#d", "none.svg"]


@pytest.mark.parametrize("page", PAGES[1:], ids=NAMES[1:])
def test_every_page_is_reached_from_the_readme(page: Path) -> None:
    assert f"docs/{page.name}" in {link.partition("#")[0] for link in links(PAGES[0])}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    """Tests go by their names below tests/; words in capitals stand for a name."""
    for name in re.findall(r"`([\w./-]+)`", unfenced(page.read_text())):
        if re.search(r"[/_][A-Z]+\.", name):
            continue
        if re.fullmatch(r"(\w+/)*test_\w+\.py", name):
            assert list((ROOT / "tests").rglob(name.removeprefix("tests/"))), name
        elif re.match(r"(doremi_train|conf|launch|benchmarks)/", name):
            assert (ROOT / name).exists(), name


# ── Faults ──────────────────────────────────────────────────────────────────────────


def shown_by() -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """(fault, [(file, [part of the name of a test, …]), …]) of every line of the table."""
    table = (ROOT / "docs" / "faults.md").read_text().partition("\n## Faults\n")[2]
    for line in re.findall(r"^\| (.+) \|$", table.partition("\n## ")[0], re.MULTILINE)[2:]:
        fault, _, tests = line.split(" | ")
        files: list[tuple[str, list[str]]] = []
        for code in re.findall(r"`([^`]+)`", tests):
            if code.endswith(".py"):
                files.append((code, []))
            else:
                files[-1][1].append(code)
        yield fault, files


FAULTS = list(shown_by())


@pytest.mark.parametrize(("fault", "files"), FAULTS, ids=[fault for fault, _ in FAULTS])
def test_every_line_of_the_table_of_faults_has_its_tests(
    fault: str, files: list[tuple[str, list[str]]]
) -> None:
    assert files
    for file, parts in files:
        (path,) = (ROOT / "tests").rglob(file)
        tests = re.findall(r"^def test_(\w+)", path.read_text(), re.MULTILINE)
        assert parts, f"{file}: say by which of its tests"
        assert all(any(part in test for test in tests) for part in parts), (file, parts)


def test_every_test_of_faults_stands_in_the_table() -> None:
    source = (ROOT / "tests" / "test_faults.py").read_text()
    parts = {part for _, files in FAULTS for _, some in files for part in some}
    for test in re.findall(r"^def test_(\w+)", source, re.MULTILINE):
        assert any(part in test for part in parts), test
