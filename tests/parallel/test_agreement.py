"""Processes that are no parts of one run end before anything is computed, and what one of them says
at its end is heard."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import forked
from helpers.command import Outcome, environment, run_here

from doremi_train.parallel.agreement import ERROR, differences, statement


def two(first: list[str], second: list[str], cwds: list[Path] | None = None) -> list[Outcome]:
    """The command as two processes, with overrides and a working directory for each."""
    port = forked.free_port()
    processes = [
        forked.ranks(
            2, given, environment(), cwds[rank] if cwds else None, present=[rank], port=port
        )[0]
        for rank, given in enumerate((first, second))
    ]
    return [Outcome(*forked.ended([process], 300)) for process in processes]


def said(outcomes: list[Outcome]) -> str:
    """The one message of two processes that end by a mistake."""
    assert [outcome.code for outcome in outcomes] == [2, 2], outcomes
    text = "".join(outcome.err for outcome in outcomes)
    assert text.count("doremi-train: ") == 1 and "Traceback" not in text, text
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (["training.learning_rate=0.001"], ["training.learning_rate=0.002"],
         ["process 1: training.learning_rate=0.002 where the first has 0.001", "same command"]),
        (["seed=3", "training.threads=1"], ["seed=4", "training.threads=2"],
         ["process 1: seed=4 where the first has 3;"]),
        ([], ["training.batch_size=0"], ["process 1: training.batch_size=0: "]),
        (["training.batch_size=0"], [], ["process 1: the first one: training.batch_size=0: "]),
        (["training.batch_size=0"], ["training.batch_size=0"], ["train: training.batch_size=0: "]),
        ([], ["training.batchsize=8"], ["process 1: ", "batchsize"]),
        (["stage=cook"], ["stage=cook"], ["train: stage=cook: "]),
    ],
    ids=str,
)  # fmt: skip
def test_processes_of_two_minds_compute_nothing(
    first: list[str], second: list[str], words: list[str], tiny: list[str], tmp_path: Path
) -> None:
    common = [*tiny, f"store={tmp_path / 'store'}", f"run_dir={tmp_path / 'run'}", "stage=prepare"]
    message = said(two([*common, *first], [*common, *second]))
    assert all(word in message for word in words), message
    assert not (tmp_path / "store").exists() and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_start_model_that_is_another_on_one_machine_is_named(
    tiny: list[str], tmp_path: Path
) -> None:
    cwds = [tmp_path / "first", tmp_path / "second"]
    for seed, cwd in enumerate(cwds):
        run = tmp_path / f"run-{seed}"
        made = run_here(*tiny, f"run_dir={run}", f"seed={seed}", "stage=reference")
        assert made.code == 0, made
        cwd.mkdir()
        (cwd / "model").symlink_to(run / "reference" / "model")
    overrides = [*tiny, "reference.path=model", f"run_dir={tmp_path / 'run'}", "stage=proxy"]
    message = said(two(overrides, overrides, cwds))
    assert "process 1: recipe of " in message and "where the first has" in message
    assert not list((tmp_path / "run").glob("*/model"))


WORDS = """
import os
from doremi_train import command
from doremi_train.parallel import comm, launcher, place
place.start(launcher.EngineOptions(), "fp32", timeout=60)
comm.leave()
command.die({words}, 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("'all of us'", ["doremi-train: all of us"]),
        ("os.environ['RANK']", ["doremi-train: 0", "doremi-train: process 1: 1"]),
    ],
)
def test_the_first_speaks_for_those_that_say_the_same(
    words: str, expected: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "end.py"
    script.write_text(WORDS.format(words=words))
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)], env=environment() | both | {"RANK": r, "LOCAL_RANK": r},
            stderr=subprocess.PIPE, text=True,
        )
        for r in "01"
    ]  # fmt: skip
    text = "".join(process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2], text
    assert sorted(text.splitlines()) == expected


def test_statements_are_compared_by_key() -> None:
    plain = statement({"a": 1, "b": [*range(100)], "version of torch": "2.1"})
    other = statement({"a": 1, "b": [*range(99), 7], "version of torch": "2.2"})
    assert differences([plain, dict(plain)]) is None
    found = differences([plain, plain, other])
    assert found is not None and "process 2: b=[0, 1, " in found and "process 1" not in found
    assert 'version of torch="2.2" where the first has "2.1"' in found and "a=1" not in found
    many = differences([plain, *[other] * 9])
    assert many is not None and many.count("process ") == 5 and "4 more processes" in many
    failed = differences([plain, {ERROR: "seed=x: wrong"}])
    assert failed is not None and "process 1: seed=x: wrong" in failed
