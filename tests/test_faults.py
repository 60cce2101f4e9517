"""Whatever goes wrong, nothing is lost and nothing hangs: the lines of the table in docs/faults.md
that no other file shows. `test_readme` compares the table with the tests."""

import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import forked
from helpers.command import Command, environment, start
from helpers.processes import (
    STEPS,
    checkpoints,
    ended,
    lines,
    reached,
    read,
    same_bits,
    same_numbers,
    wait_for,
)

pytestmark = pytest.mark.slow


@contextmanager
def ranks(count: int, *overrides: str) -> Iterator[list[forked.Forked]]:
    """The command as `count` processes that no agent watches, as on several nodes; none outlives
    the test."""
    started = forked.ranks(count, overrides, environment())
    try:
        yield started
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.communicate()


# ── Killed ──────────────────────────────────────────────────────────────────────────


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("kills", "processes", "engine"),
    [(14, 1, "auto"), (2, 2, "ddp"), (2, 2, "fsdp2"), (2, 2, "zero2")],
)
def test_killed_at_random_steps_again_and_again(
    kills: int, processes: int, engine: str, prepared: list[str], doremi: Command, tmp_path: Path
) -> None:
    """Twenty kills in all. Wherever they fall, the run ends in the bits of one that was never
    killed."""
    overrides = [*prepared, "stage=proxy", f"engine={engine}"]
    never = doremi(
        *overrides,
        f"store={other_store(tmp_path)}",
        f"run_dir={tmp_path / 'never'}",
        processes=processes,
    )
    assert never.code == 0, never
    overrides += [f"run_dir={tmp_path / 'killed'}"]
    dice = random.Random(f"{processes} {engine}")
    fell: list[str] = []
    for kill in range(kills):
        # Half of them in the reference, half in the proxy; from the checkpoint on, or before there
        # is one.
        stage = "reference" if kill < kills // 2 else "proxy"
        step = dice.randint(1, STEPS - 2)
        with ranks(processes, *overrides) as started:  # and all are killed
            wait_for(
                lambda stage=stage, step=step: at_work(tmp_path / "killed" / stage, step),
                started[0],
            )
        fell.append(f"{stage} {checkpoints(tmp_path / 'killed' / stage)}")
    continued = doremi(*overrides, processes=processes)
    assert continued.code == 0, continued
    names = [
        "proxy/domain_weights.jsonl",
        *(f"{s}/model/model.safetensors" for s in ("reference", "proxy")),
    ]
    for name in names:
        assert (tmp_path / "never" / name).read_bytes() == (
            tmp_path / "killed" / name
        ).read_bytes(), (name, fell)


def other_store(tmp_path: Path) -> Path:
    """A store with the same prepared data and none of the runs."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "data").symlink_to((tmp_path / "store" / "data").resolve())
    return folder


def at_work(stage: Path, step: int) -> bool:
    """Whether the stage has done this step, or is past all the steps that it still had to do."""
    log = stage / "domain_weights.jsonl" if stage.name == "proxy" else stage / "metrics.jsonl"
    done = lines(log)[-1]["step"] if log.exists() and lines(log) else 0
    return done >= step or (stage / "result.json").exists()


@pytest.mark.acceptance
def test_rounds_and_seeds_continue_where_they_were_killed(
    prepared: list[str], doremi: Command, tmp_path: Path
) -> None:
    overrides = [*prepared, "stage=main", "main.comparisons=[]", "training.steps=30"]
    overrides += ["proxy.rounds=2", "proxy.seeds=2", "proxy.round_tolerance=0"]
    never = doremi(*overrides, f"store={other_store(tmp_path)}", f"run_dir={tmp_path / 'never'}")
    assert never.code == 0, never
    run_dir = tmp_path / "run"
    for where in ("proxy/round-1/seed-1", "proxy/round-2/reference", "proxy/round-2/seed-1"):
        process = start(*overrides, f"run_dir={run_dir}")
        wait_for(lambda where=where: reached(run_dir / where, 7), process)
        process.kill()
        process.communicate()
    continued = doremi(*overrides, f"run_dir={run_dir}")
    assert continued.code == 0, continued
    # Nothing that was finished is done again.
    assert continued.out.count("is in the store already") >= 4
    traces = [f"proxy/round-{r}/seed-{s}/domain_weights.jsonl" for r in (1, 2) for s in (0, 1)]
    for name in ("weights.json", "main/model/model.safetensors", *traces):
        assert (tmp_path / "never" / name).read_bytes() == (run_dir / name).read_bytes(), name


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("first", "then"), [((2, "fsdp2"), (1, "auto")), ((1, "auto"), (2, "zero3"))]
)
def test_continued_on_another_number_of_processes(
    first: tuple[int, str],
    then: tuple[int, str],
    uninterrupted: Path,
    prepared: list[str],
    doremi: Command,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*prepared, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]"]
    with ranks(first[0], *overrides, f"engine={first[1]}") as started:
        wait_for(lambda: reached(run_dir / "proxy", 14), started[0])
    assert 14 <= checkpoints(run_dir / "proxy")[-1] < STEPS
    outcome = doremi(*overrides, f"engine={then[1]}", processes=then[0])
    assert outcome.code == 0, outcome
    assert f"{then[1]}, {then[0]} process" in outcome.out.replace("single", "auto"), outcome.out
    same_numbers(uninterrupted, run_dir)


# ── A process that is gone, or does not answer ──────────────────────────────────────


@pytest.mark.acceptance
@pytest.mark.parametrize("gone", [0, 1])
def test_a_vanished_process_ends_the_others_with_a_message(
    gone: int,
    uninterrupted: Path,
    prepared: list[str],
    doremi: Command,
    tmp_path: Path,
) -> None:
    overrides = [*prepared, f"run_dir={tmp_path / 'run'}", "stage=main", "main.comparisons=[]"]
    with ranks(2, *overrides) as both:
        wait_for(lambda: reached(tmp_path / "run" / "proxy", 7), both[0])
        both[gone].kill()
        left = ended(both[1 - gone])
    assert left.code == 1, left
    assert (
        "another process ended" in left.err
        and "training.timeout" in left.err
        and "Traceback" not in left.err
    )
    if gone == 1:  # the first process writes how it ended
        found = [read(path) for path in (tmp_path / "run").glob("*/status.json")]
        # The proxy, or main after it.
        (failed,) = (status for status in found if status["state"] == "failed")
        assert "another process ended" in failed["message"]
    outcome = doremi(*overrides, processes=2)
    assert outcome.code == 0, outcome
    same_numbers(uninterrupted, tmp_path / "run")


@pytest.mark.acceptance
def test_a_process_that_does_not_answer_is_given_up_after_the_timeout(
    prepared: list[str], tmp_path: Path
) -> None:
    overrides = [*prepared, f"run_dir={tmp_path / 'run'}", "stage=reference", "training.timeout=15"]
    with ranks(2, *overrides, "training.steps=50000", "evaluation.every=50000") as (left, frozen):
        wait_for(lambda: reached(tmp_path / "run" / "reference", 7), left)
        frozen.send_signal(signal.SIGSTOP)
        outcome = ended(left)
    assert outcome.code == 1 and "training.timeout=15 s" in outcome.err, outcome
    assert read(tmp_path / "run" / "reference" / "status.json")["state"] == "failed"


ALIVE = """
import sys, time
from doremi_train.parallel import comm, launcher, place
place.start(launcher.EngineOptions(), "fp32", timeout=5)
slow = lambda: time.sleep(float(sys.argv[1])) or "done"
assert comm.on_first(slow) == "done"
try:
    comm.on_first(lambda: 1 / 0)
except ZeroDivisionError:
    print("raised on", comm.world().rank, flush=True)
comm.leave()
"""


@pytest.mark.acceptance
def test_long_work_of_the_first_process_is_waited_for(tmp_path: Path) -> None:
    """Tokenising takes hours, and the timeout is for processes that are gone."""
    script = tmp_path / "alive.py"
    script.write_text(ALIVE)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run(
        [*launch, str(script), "12"],
        env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"raised on 0", "raised on 1"} <= set(done.stdout.splitlines())


# ── A full disk ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.acceptance)])
def test_a_full_disk_is_named_and_the_run_continues_when_there_is_room(
    processes: int,
    uninterrupted: Path,
    prepared: list[str],
    doremi: Command,
    tmp_path: Path,
) -> None:
    """No file may grow beyond a size that the logs do not reach and a part of a checkpoint does."""
    overrides = [*prepared, f"run_dir={tmp_path / 'run'}", "stage=main", "main.comparisons=[]"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 // processes, before[1]))
    try:
        full = doremi(*overrides, processes=processes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.code == 1, full
    assert "no room left" in full.err and "the same command continues" in full.err, full
    assert processes == 2 or "Traceback" not in full.err  # torchrun adds its own
    assert read(tmp_path / "run" / "reference" / "status.json")["state"] == "failed"
    assert not checkpoints(tmp_path / "run" / "reference")
    assert not [path for path in (tmp_path / "run").resolve().rglob("*.partial") if path.is_file()]
    outcome = doremi(*overrides, processes=processes)
    assert outcome.code == 0, outcome
    (same_bits if processes == 1 else same_numbers)(uninterrupted, tmp_path / "run")
