"""What only real processes show: two give the numbers of one, and a run that was stopped ends in
the same bits."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from helpers.command import Command, run_here, start
from helpers.processes import (
    STEPS,
    checkpoints,
    ended,
    lines,
    reached,
    read,
    reaped,
    same_bits,
    same_numbers,
    wait_for,
)

pytestmark = pytest.mark.slow

# ── Two processes are one ───────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def alone(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert run_here(*tiny, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]").code == 0
    return run_dir


@pytest.mark.parametrize("parts", [1, 2], ids=["one part", "two micro-batches"])
def test_two_processes_give_the_numbers_of_one(
    parts: int, alone: Path, doremi: Command, tiny: list[str], tmp_path: Path
) -> None:
    more = [f"store={tmp_path / 'store'}", f"training.micro_batch_size={8 // 2 // parts}"]
    more += ["stage=main", "main.comparisons=[]"]
    outcome = doremi(*tiny, f"run_dir={tmp_path / 'run'}", *more, processes=2)
    assert outcome.code == 0, outcome.err
    same_numbers(alone, tmp_path / "run")


@pytest.mark.acceptance
def test_two_processes_are_stopped_by_a_signal_to_one(prepared: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [
        *prepared,
        f"run_dir={run_dir}",
        "stage=reference",
        "training.steps=400",
        "evaluation.every=400",
    ]
    agent = start(*overrides, processes=2)
    with reaped(agent):
        wait_for(lambda: reached(run_dir / "reference", 14), agent)
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        # One rank is told, not the agent; the step's exchange tells all.
        os.kill(int(children[-1]), signal.SIGTERM)
        outcome = ended(agent)
    assert outcome.code == 1, outcome  # torchrun's own
    assert read(run_dir / "reference" / "status.json")["state"] == "preempted", outcome.err
    assert 14 <= checkpoints(run_dir / "reference")[-1] < 400


# ── Stopped and continued ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.acceptance),
        pytest.param(signal.SIGINT, marks=pytest.mark.acceptance),
    ],
    ids=lambda number: number.name,
)
def test_told_to_stop_it_saves_and_continues(
    number: signal.Signals,
    uninterrupted: Path,
    doremi: Command,
    prepared: list[str],
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*prepared, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]"]
    process = start(*overrides)
    proxy = run_dir / "proxy"
    with reaped(process):
        wait_for(lambda: reached(proxy, 7), process)
        seen = len(lines(proxy / "domain_weights.jsonl"))
        process.send_signal(number)
        outcome = ended(process)
    assert outcome.code == 75, outcome
    assert "Traceback" not in outcome.err and "the same command continues it" in outcome.err
    status = read(proxy / "status.json")
    assert status["state"] == "preempted" and "saved at step" in status["message"], status
    stopped = checkpoints(proxy)[-1]
    assert stopped == len(lines(proxy / "domain_weights.jsonl")) < STEPS  # saved where it stopped
    # And soon: the polling and the signal's way take some steps of a few milliseconds.
    assert stopped - seen < 10
    assert not (run_dir / "weights.json").exists()
    outcome = doremi(*overrides)
    assert outcome.code == 0, outcome
    same_bits(uninterrupted, run_dir)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("reference", marks=pytest.mark.acceptance),
        "proxy",
        pytest.param("main", marks=pytest.mark.acceptance),
    ],
)
def test_killed_at_any_step_it_continues(
    stage: str, uninterrupted: Path, doremi: Command, prepared: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*prepared, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]"]
    process = start(*overrides)
    with reaped(process):
        wait_for(lambda: reached(run_dir / stage, 7), process)
        time.sleep(random.Random(f"{stage}").uniform(0, 0.2))
        process.kill()
        outcome = ended(process)
    assert outcome.code == -signal.SIGKILL
    outcome = doremi(*overrides)
    assert outcome.code == 0, outcome
    same_bits(uninterrupted, run_dir)
    assert not [path for path in run_dir.glob("**/*.partial") if path.is_file()]


# ── Two commands at once ────────────────────────────────────────────────────────────


def test_a_second_start_in_one_run_dir_is_refused(
    prepared: list[str], doremi: Command, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = [
        *prepared,
        f"run_dir={run_dir}",
        "stage=reference",
        "training.steps=2000",
        "evaluation.every=2000",
    ]
    first = start(*overrides)
    with reaped(first):
        wait_for(lambda: reached(run_dir / "reference", 7), first)
        second = doremi(*overrides)
        assert first.poll() is None, "the first ended before the second was refused"
        first.send_signal(signal.SIGTERM)
        assert ended(first).code == 75
    assert second.code == 2, second
    assert (
        f"process {first.pid}" in second.err
        and "run_dir" in second.err
        and "Traceback" not in second.err
    )
    # The refused start must not have written over the status of the one at work, which ended after
    # it.
    assert read(run_dir / "reference" / "status.json")["state"] == "preempted"


def test_two_run_dirs_that_need_the_same_run_wait_for_each_other(
    prepared: list[str], tmp_path: Path
) -> None:
    one, two = (
        start(*prepared, f"run_dir={tmp_path / name}", "stage=reference") for name in ("one", "two")
    )
    with reaped(one), reaped(two):
        outcomes = [ended(one), ended(two)]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert (tmp_path / "one" / "reference").resolve() == (tmp_path / "two" / "reference").resolve()
    runs = [path for path in (tmp_path / "store" / "runs").iterdir() if path.is_dir()]
    assert len(runs) == 1 and read(runs[0] / "status.json")["state"] == "finished"
