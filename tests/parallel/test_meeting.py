"""Processes that cannot meet end with a message within training.timeout, and hear signals
meanwhile."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import forked, web
from helpers.command import environment
from helpers.processes import ended, wait_for

pytestmark = pytest.mark.slow


@contextmanager
def started(
    tmp_path: Path, count: int, present: Sequence[int], port: int, timeout: float = 4
) -> Iterator[list[forked.Forked]]:
    """Some of `count` processes, which would meet at `port`; none outlives the test."""
    overrides = [f"run_dir={tmp_path / 'run'}", "stage=plan", f"training.timeout={timeout:g}"]
    processes = forked.ranks(count, overrides, environment(), present=present, port=port)
    try:
        yield processes
        assert not (tmp_path / "run").exists()
    finally:
        for process in processes:
            process.kill()


def unmet(process: forked.Forked, rank: int, port: int, timeout: float = 4) -> str:
    """What a process says that did not meet the others."""
    outcome = ended(process)  # type: ignore[arg-type]
    assert outcome.code == 1 and "Traceback" not in outcome.err, outcome
    (message,) = (
        line
        for line in outcome.err.splitlines()
        if line.startswith(f"doremi-train: process {rank}: ")
    )
    for word in (f":{port} within training.timeout={timeout:g} s", "take another port"):
        assert word in message
    return message


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 50, b"\0" * 4096])
def test_where_something_else_listens_it_is_given_up(greeting: bytes, tmp_path: Path) -> None:
    with (
        web.listening(greeting) as other,
        started(tmp_path, 2, [0, 1], other.port) as (first, second),
    ):
        message = unmet(first, 0, other.port)
        assert "cannot listen there" in message and "address already in use" in message
        assert "nobody answers there" in unmet(second, 1, other.port)


def test_where_no_connection_is_taken_it_is_given_up(tmp_path: Path) -> None:
    with web.full() as port, started(tmp_path, 2, [1], port) as (process,):
        assert "nobody answers there" in unmet(process, 1, port)


def test_where_nobody_listens_it_is_given_up(tmp_path: Path) -> None:
    port = forked.free_port()
    with started(tmp_path, 2, [1], port) as (process,):
        assert "nobody answers there" in unmet(process, 1, port)


def test_processes_that_did_not_come_are_named(tmp_path: Path) -> None:
    port = forked.free_port()
    # Long enough for both to come on a machine that is busy.
    with started(tmp_path, 4, [0, 2], port, 20) as (first, other):
        assert "of 4 processes did not come: RANK=1, 3;" in unmet(first, 0, port, 20)
        assert "others were not" in unmet(other, 2, port, 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_told_to_stop_it_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """At once: waiting for the others would take much longer than `ended` waits."""
    with web.listening() as other, started(tmp_path, 2, [1], other.port, 3600) as (process,):
        wait_for(other.came.is_set, process)  # type: ignore[arg-type]
        process.send_signal(number)
        outcome = ended(process)  # type: ignore[arg-type]
    assert outcome.code == 75 and "Traceback" not in outcome.err, outcome


def test_the_first_told_to_stop_says_so(tmp_path: Path) -> None:
    port = forked.free_port()
    with started(tmp_path, 2, [0], port, 3600) as (process,):
        wait_for(lambda: web.answers(port), process)  # type: ignore[arg-type]
        process.terminate()
        outcome = ended(process)  # type: ignore[arg-type]
    assert outcome.code == 75 and "meeting the other processes: told to stop" in outcome.err


AGAIN = """
from doremi_train.parallel import comm, launcher, place
for time in range(3):
    place.start(launcher.EngineOptions(), "fp32", timeout=60)
    assert comm.world().size == 2
    assert comm.on_first(lambda: time) == time
    comm.leave()
print("met", flush=True)
"""


@pytest.mark.parametrize("agent", [True, False], ids=["torchrun", "no agent"])
def test_processes_meet_again_and_again(agent: bool, tmp_path: Path) -> None:
    """As the jobs of a sweep do."""
    script = tmp_path / "again.py"
    script.write_text(AGAIN)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(forked.free_port())}
    ranks = [{}] if agent else [{**both, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = [
        subprocess.Popen(
            [sys.executable, *(launch if agent else []), str(script)],
            env=environment() | given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for given in ranks
    ]  # fmt: skip
    outcomes = [ended(process) for process in processes]
    assert [outcome.code for outcome in outcomes] == [0] * len(ranks), outcomes
    assert sum(outcome.out.count("met") for outcome in outcomes) == 2
