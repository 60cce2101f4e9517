"""Child runs as processes on this machine: the same result as one after another, stopped and failed
as one command."""

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Command, run_here, start
from helpers.processes import checkpoints, ended, read, reaped, wait_for

from doremi_train import files
from doremi_train.parallel import slurm
from doremi_train.stages.options import identity

pytestmark = pytest.mark.slow

LOCAL = ("stage=proxy", "proxy.seeds=2", "submit.cluster=local")


@pytest.mark.parametrize(
    ("tasks", "rounds"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.acceptance)]
)
def test_seeds_side_by_side_are_those_one_after_another(
    tasks: int, rounds: int, fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    seeds = [
        "stage=main",
        "main.comparisons=[]",
        "proxy.seeds=2",
        f"proxy.rounds={rounds}",
        "proxy.round_tolerance=0",
    ]
    assert (
        run_here(*fresh, *seeds, f"run_dir={tmp_path / 'one'}", f"store={tmp_path / 'other'}").code
        == 0
    )
    side = [f"run_dir={tmp_path / 'two'}", "submit.cluster=local", f"submit.tasks_per_node={tasks}"]
    outcome = doremi(*fresh, *seeds, *side)
    assert outcome.code == 0, outcome
    one, two = (tmp_path / name / "weights.json" for name in ("one", "two"))
    if tasks == 1:
        assert one.read_bytes() == two.read_bytes()
    for name, weight in read(one)["weights"].items():
        assert abs(weight - read(two)["weights"][name]) < 1e-6
    for seed in (0, 1):  # by a child, and not by the parent after it
        assert (
            tmp_path / f"two/proxy/round-{rounds}/jobs" / f"seed-{seed}" / "proxy/result.json"
        ).exists()
    # How it is computed is no part of what is: the same run_dir without jobs has nothing left to
    # do.
    again = doremi(*fresh, *seeds, f"run_dir={tmp_path / 'two'}")
    assert again.code == 0 and "is job" not in again.out


@pytest.mark.acceptance
def test_a_parent_of_two_ranks_submits_once(
    fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    """The children must not take themselves for ranks of their parent."""
    outcome = doremi(*fresh, *LOCAL, f"run_dir={tmp_path / 'run'}", processes=2)
    assert outcome.code == 0, outcome
    assert outcome.out.count("is job") == 2
    assert len(list((tmp_path / "run/proxy/round-1/jobs").glob("seed-*/config.yaml"))) == 2


@pytest.mark.acceptance
def test_a_stopped_parent_stops_its_children_who_are_continued(
    fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    # Long enough that on a busy machine the first child still trains when the second has begun.
    long = ["training.steps=500", "training.checkpoint_every=20", "evaluation.every=500"]
    overrides = [*fresh, *LOCAL, *long, f"run_dir={tmp_path / 'run'}"]
    folders = [tmp_path / f"run/proxy/round-1/jobs/seed-{seed}/proxy" for seed in (0, 1)]
    parent = start(*overrides)
    with reaped(parent):
        wait_for(lambda: all(checkpoints(folder) for folder in folders), parent)
        parent.terminate()
        outcome = ended(parent)
    assert outcome.code == 75 and "the same command continues" in outcome.err, outcome
    assert [read(folder / "status.json")["state"] for folder in folders] == ["preempted"] * 2
    assert read(tmp_path / "run/proxy/status.json")["state"] == "preempted"
    stopped = [checkpoints(folder)[-1] for folder in folders]
    assert all(0 < step < 500 for step in stopped)
    outcome = doremi(*overrides)
    assert outcome.code == 0, outcome
    alone = run_here(*fresh, *long, "stage=proxy", "proxy.seeds=2", f"run_dir={tmp_path / 'one'}",
                     f"store={tmp_path / 'other'}")  # fmt: skip
    assert alone.code == 0
    for seed in (0, 1):
        one, two = (
            tmp_path / run / f"proxy/round-1/seed-{seed}/domain_weights.jsonl"
            for run in ("one", "run")
        )
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.acceptance
def test_children_end_with_a_killed_parent_and_the_next_command_waits_for_them(
    fresh: list[str], tmp_path: Path
) -> None:
    long = ["training.steps=500", "training.checkpoint_every=20", "evaluation.every=500"]
    overrides = [*fresh, *LOCAL, *long, "submit.parallel=1", f"run_dir={tmp_path / 'run'}"]
    child = tmp_path / "run/proxy/round-1/jobs/seed-0"
    parent = start(*overrides)
    with reaped(parent):
        wait_for(lambda: bool(checkpoints(child / "proxy")), parent)
        parent.kill()
        ended(parent)
    again = start(*overrides)
    said = again._files[0]  # what it prints, while it runs
    with reaped(again), files.at_work(child):  # as a child does that is about to save
        wait_for(
            lambda: "seed-0 is at work for an earlier command; waiting" in squeezed(said), again
        )
        assert "is job" not in said.read_text()
        wait_for(lambda: read(child / "proxy/status.json")["state"] == "preempted", again)
        assert 0 < checkpoints(child / "proxy")[-1] < 500
        again.terminate()
        outcome = ended(again)
    assert outcome.code == 75 and not files.in_use(child), outcome


def squeezed(path: Path) -> str:
    return " ".join(path.read_text().split())


@pytest.mark.acceptance
def test_a_sweep_in_processes_is_the_sweep_in_one(
    fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    sweep = ["-m", *fresh, "stage=main", "main.comparisons=[]", "seed=0,1"]
    one = doremi(*sweep, f"run_dir={tmp_path / 'one'}", f"store={tmp_path / 'other'}")
    two = doremi(*sweep, f"run_dir={tmp_path / 'two'}", "hydra/launcher=submitit_local")
    assert (one.code, two.code) == (0, 0), (one, two)
    for name in ("seed=0", "seed=1"):
        (first,), (second,) = (
            (tmp_path / run).glob(f"*{name}*/weights.json") for run in ("one", "two")
        )
        assert first.read_bytes() == second.read_bytes()
        assert first.with_name("main").resolve() != second.with_name("main").resolve()


@pytest.mark.acceptance
def test_a_failed_child_is_named_with_its_message(
    fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    broken = [
        *fresh,
        "training.learning_rate=1e30",
        "training.gradient_clip=null",
        "training.warmup=0.0",
    ]
    assert run_here(*fresh, f"run_dir={tmp_path / 'made'}", "stage=reference").code == 0
    given = f"reference.path={tmp_path / 'made/reference/model'}"
    outcome = doremi(*broken, *LOCAL, given, f"run_dir={tmp_path / 'run'}", "submit.parallel=1")
    assert outcome.code == 1, outcome
    assert "proxy/round-1/seed-0: " in outcome.err and "the loss is not finite" in outcome.err
    assert "_log.err ends with" in outcome.err and "Traceback" not in outcome.err
    assert not list((tmp_path / "run/proxy/round-1/jobs").glob("seed-1*")), (
        "none is started after a failure"
    )


@pytest.mark.acceptance
def test_a_killed_child_is_named(fresh: list[str], tmp_path: Path) -> None:
    assert run_here(*fresh, f"run_dir={tmp_path / 'made'}", "stage=reference").code == 0
    long = ["training.steps=100000", "training.checkpoint_every=20", "evaluation.every=100000"]
    long += [f"reference.path={tmp_path / 'made/reference/model'}", "submit.parallel=1"]
    parent = start(*fresh, *LOCAL, *long, f"run_dir={tmp_path / 'run'}")
    folder = tmp_path / "run/proxy/round-1/jobs/seed-0/proxy"
    with reaped(parent):
        wait_for(lambda: bool(checkpoints(folder)), parent)
        holder = (folder / ".lock").read_text()
        os.kill(int(holder.rpartition("(process ")[2].split()[0]), 9)
        outcome = ended(parent)
    assert (
        outcome.code == 1
        and "seed-0: job" in outcome.err
        and "ended without a result" in outcome.err
    ), outcome


def test_how_children_run_is_no_part_of_what_is_computed() -> None:
    plain: dict[str, Any] = {
        "seed": 1,
        "submit": {"cluster": "slurm", "extra": {"account": "mine"}},
    }
    assert identity(plain) == {"seed": 1}


# ── Ranks from variables ────────────────────────────────────────────────────────────

STEP = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "n[03-05,7],m1",
    "MASTER_ADDR": "10.0.0.1",
}  # fmt: skip
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def exported(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str | None]:
    for name in [
        name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_")) or name in RANKS
    ]:
        monkeypatch.delenv(name)
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        before = dict(os.environ)
        try:
            slurm.export_ranks()
            return [os.environ.get(name) for name in RANKS]
        finally:
            os.environ.clear()
            os.environ |= before


def test_a_task_of_a_step_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exported(monkeypatch, **STEP)[:5] == ["5", "7", "1", "2", "10.0.0.1"]
    assert exported(monkeypatch, **STEP, MASTER_PORT="1234")[5] == "1234"
    ports = {exported(monkeypatch, **STEP | {"SLURM_PROCID": rank})[5] for rank in "0123456"}
    assert len(ports) == 1 and 20_000 <= int(ports.pop() or 0) < 32_000
    assert (
        exported(monkeypatch, **STEP)[5]
        != exported(monkeypatch, **STEP | {"SLURM_STEP_ID": "4"})[5]
    )


def test_a_batch_script_and_a_task_alone_are_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert exported(monkeypatch, **batch) == [None] * 6
    assert exported(monkeypatch, **STEP | {"SLURM_STEP_NUM_TASKS": "1"})[:4] == [None] * 4


def test_what_a_launcher_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exported(monkeypatch, **STEP, RANK="0", WORLD_SIZE="2")[:4] == ["0", "2", None, None]


def test_a_local_job_inside_a_step_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    local = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_GLOBALID": "1",
    }
    local |= {"SUBMITIT_LOCAL_LOCALID": "1", "SUBMITIT_LOCAL_JOB_ID": "4000"}
    step = {name: value for name, value in STEP.items() if name != "MASTER_ADDR"}
    assert exported(monkeypatch, **step, **local)[:5] == ["1", "2", "1", "2", "127.0.0.1"]


def test_the_first_node_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for nodes, first in (
        ("n[03-05,7],m1", "n03"),
        ("localhost", "localhost"),
        ("r[1-2]n[4,6-9]", "r1n4"),
    ):
        step = {name: value for name, value in STEP.items() if name != "MASTER_ADDR"}
        assert (
            exported(monkeypatch, **step | {"SLURM_STEP_NODELIST": nodes, "PATH": "/nowhere"})[4]
            == first
        )
