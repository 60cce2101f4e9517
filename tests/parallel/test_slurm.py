"""On a real Slurm of two nodes: ranks, requeues, arrays, dependent jobs, sweeps, and children of a
run."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import ROOT, run_here
from helpers.corpus import documents, write_jsonl
from helpers.processes import checkpoints, lines, read, same_bits
from helpers.topics import planted

pytestmark = pytest.mark.acceptance

LAUNCH = ROOT / "launch" / "slurm"
# Long enough that a signal finds it at work; a checkpoint now and then.
LONG = ("training.steps=200", "training.checkpoint_every=25", "evaluation.every=100")


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    missing = [
        name
        for name in ("sbatch", "slurmctld", "slurmd", "munged")
        if not shutil.which(name, path=path)
    ]
    if missing or os.geteuid():
        pytest.skip(
            f"needs root and Debian's slurm-wlm and munge; missing: {', '.join(missing) or 'root'}"
        )
    folder = tmp_path_factory.mktemp("slurm")
    script = str(ROOT / "tests" / "helpers" / "slurm.sh")
    with pytest.MonkeyPatch.context() as patch:
        try:
            up = subprocess.run(
                [script, "up", str(folder)],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert up.returncode == 0, up.stderr
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv(
                "PYTHONPATH",
                os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            )
            patch.setenv("PYTHON", sys.executable)
            # Slurm ends a job that asks to be requeued, and the scontrol that asks: here always
            # before it returns.
            slow = folder / "bin" / "scontrol"
            slow.parent.mkdir()
            slow.write_text(
                f'#!/bin/sh\n{shutil.which("scontrol")} "$@" || exit\n'
                '[ "$1" != requeue ] || sleep 4\n'
            )
            slow.chmod(0o755)
            patch.setenv("PATH", os.pathsep.join([str(slow.parent), os.environ["PATH"]]))
            patch.setenv("OMP_NUM_THREADS", "1")
            yield
        finally:
            subprocess.run([script, "down", str(folder)], timeout=120, check=False)


def call(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=420,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def submit(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    """The number of a job of the stage script."""
    return (
        call("sbatch", "--parsable", *arguments, cwd=cwd, **environment).strip().partition(";")[0]
    )


def wait_for(condition: Callable[[], object], what: str, seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited too long for {what}"
        time.sleep(0.1)


def field(job: str, name: str) -> str:
    """A field of `scontrol show job`, such as JobState or ExitCode."""
    shown = call("scontrol", "show", "job", job, cwd=Path("/"))
    return next(part.partition("=")[2] for part in shown.split() if part.startswith(f"{name}="))


def ended(job: str, tmp_path: Path, seconds: float = 240) -> str:
    """The state in which a job ends; what it wrote is shown where that is not success."""
    going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
    wait_for(lambda: field(job, "JobState") not in going, f"job {job}", seconds)
    if field(job, "JobState") != "COMPLETED":
        print(*(f"{path}:\n{path.read_text()}" for path in tmp_path.glob("*.log")), sep="\n")
    return field(job, "JobState")


def close(one: Path, two: Path) -> None:
    ours, theirs = (read(run / "weights.json")["weights"] for run in (one, two))
    assert ours.keys() == theirs.keys() and all(
        abs(ours[name] - theirs[name]) < 1e-6 for name in ours
    )


# ── Ranks ───────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def alone(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert run_here(*tiny, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]").code == 0
    return run_dir


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "accelerate"])
def test_two_nodes_are_one_process(
    launcher: str, alone: Path, fresh: list[str], tmp_path: Path
) -> None:
    job = submit(
        "--nodes=2", "--ntasks-per-node=1", LAUNCH / "stage.sbatch", *fresh,
        f"run_dir={tmp_path / 'run'}",
        "stage=main", "main.comparisons=[]", cwd=tmp_path, LAUNCHER=launcher,
        ACCELERATE_USE_CPU="1",
        CONFIG=str(ROOT / "launch" / "accelerate" / "ddp.yaml"),
    )  # fmt: skip
    assert ended(job, tmp_path) == "COMPLETED"
    close(alone, tmp_path / "run")


def test_srun_alone_starts_ranks(alone: Path, fresh: list[str], tmp_path: Path) -> None:
    """No script of ours, and an uneven layout: two tasks on one node and two on the other, by the
    short form 2(x2)."""
    call(
        "srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", sys.executable, "-m",
        "doremi_train", *fresh, f"run_dir={tmp_path / 'run'}", "stage=proxy", cwd=tmp_path,
    )  # fmt: skip
    for a, b in zip(
        *(lines(run / "proxy" / "domain_weights.jsonl") for run in (alone, tmp_path / "run")),
        strict=True,
    ):
        assert all(abs(a["weights"][name] - b["weights"][name]) < 1e-6 for name in a["weights"])


def test_a_batch_script_of_several_tasks_is_one_process(fresh: list[str], tmp_path: Path) -> None:
    script = tmp_path / "plain.sbatch"
    script.write_text('#!/bin/bash\n"$PYTHON" -m doremi_train "$@"\n')
    job = submit(
        "--ntasks=4", "--output=out.log", script, *fresh, f"run_dir={tmp_path / 'run'}",
        "stage=reference", cwd=tmp_path,
    )  # fmt: skip
    assert ended(job, tmp_path) == "COMPLETED"
    assert (tmp_path / "out.log").read_text().count("reference              done in") == 1


def test_a_mistake_ends_the_job_with_its_code(fresh: list[str], tmp_path: Path) -> None:
    job = submit("--ntasks-per-node=2", LAUNCH / "stage.sbatch", *fresh, "stage=cook", cwd=tmp_path)
    assert (
        ended(job, tmp_path) == "FAILED"
        and field(job, "ExitCode") == "2:0"
        and field(job, "Restarts") == "0"
    )
    assert (
        "".join(path.read_text() for path in tmp_path.glob("*.log")).count("stage=cook: unknown")
        == 1
    )


# ── Stopped ─────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def uninterrupted(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert (
        run_here(*tiny, *LONG, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]").code == 0
    )
    return run_dir


def begun(run_dir: Path, job: str) -> Callable[[], object]:
    def condition() -> bool:
        assert field(job, "JobState") in ("PENDING", "RUNNING"), "ended too early"
        return any(checkpoints(run_dir / stage) for stage in ("reference", "proxy"))

    return condition


def test_told_to_stop_it_is_requeued_and_ends_in_the_same_bits(
    uninterrupted: Path, fresh: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(
        LAUNCH / "stage.sbatch", *fresh, *LONG, f"run_dir={run_dir}", "stage=main",
        "main.comparisons=[]", cwd=tmp_path,
    )  # fmt: skip
    wait_for(begun(run_dir, job), "a checkpoint")
    call("scancel", "--signal=USR1", job, cwd=tmp_path)  # as Slurm does before a time limit
    assert ended(job, tmp_path) == "COMPLETED" and field(job, "Restarts") == "1"
    same_bits(uninterrupted, run_dir)


def test_an_agent_s_job_is_requeued_too(fresh: list[str], tmp_path: Path) -> None:
    """torchrun, which accelerate starts too, makes 75 into 1: the status file says why."""
    run_dir = tmp_path / "run"
    job = submit(
        "--nodes=2", "--ntasks-per-node=1", LAUNCH / "stage.sbatch", *fresh, *LONG,
        f"run_dir={run_dir}", "stage=reference", "training.steps=400",
        "training.checkpoint_every=20", cwd=tmp_path, LAUNCHER="torchrun", ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    wait_for(begun(run_dir, job), "a checkpoint")
    call("scancel", "--signal=USR1", job, cwd=tmp_path)
    assert ended(job, tmp_path) == "COMPLETED" and field(job, "Restarts") == "1"
    assert read(run_dir / "reference" / "status.json")["state"] == "finished"


def test_a_time_limit_requeues_and_continues(fresh: list[str], tmp_path: Path) -> None:
    """A real one, of three minutes. Slurm looks every half minute: the signal comes 90 to 120
    seconds after the start, when a run has begun on a busy machine too."""
    run_dir = tmp_path / "run"
    steps = (
        "training.steps=1000000",
        "training.checkpoint_every=1000000",
        "evaluation.every=1000000",
    )
    job = submit(
        "--time=3", "--signal=USR1@90", LAUNCH / "stage.sbatch", *fresh, *steps,
        f"run_dir={run_dir}", "stage=reference", cwd=tmp_path,
    )  # fmt: skip
    status = run_dir / "reference" / "status.json"
    wait_for(
        lambda: field(job, "Restarts") == "1" and field(job, "JobState") == "RUNNING",
        "the second start",
        420,
    )
    assert "saved at step" in status.read_text()
    saved = checkpoints(run_dir / "reference")[-1]
    log = run_dir / "reference" / "metrics.jsonl"
    wait_for(lambda: lines(log)[-1]["step"] > saved, "the run to go on")
    call("scancel", job, cwd=tmp_path)
    wait_for(lambda: read(status)["state"] == "preempted", "the run to save again")
    wait_for(lambda: not call("squeue", "-h", cwd=tmp_path).strip(), "an empty queue")
    assert checkpoints(run_dir / "reference")[-1] >= saved > 0


def test_a_cancelled_job_saves_and_stays_away(fresh: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(
        LAUNCH / "stage.sbatch", *fresh, *LONG, "training.steps=100000", f"run_dir={run_dir}",
        "stage=reference", cwd=tmp_path,
    )  # fmt: skip
    wait_for(begun(run_dir, job), "a checkpoint")
    call("scancel", job, cwd=tmp_path)
    assert ended(job, tmp_path) == "CANCELLED"
    wait_for(lambda: not call("squeue", "-h", cwd=tmp_path).strip(), "an empty queue")
    time.sleep(3)  # no requeue comes late
    assert field(job, "JobState") == "CANCELLED" and field(job, "Restarts") == "0"
    assert read(run_dir / "reference" / "status.json")["state"] == "preempted"


# ── Several jobs ────────────────────────────────────────────────────────────────────


def test_the_pipeline_as_dependent_jobs(alone: Path, fresh: list[str], tmp_path: Path) -> None:
    shown = call(
        LAUNCH / "pipeline.sh",
        "--ntasks=1",
        "--",
        *fresh,
        f"run_dir={tmp_path / 'run'}",
        cwd=tmp_path,
    )
    jobs = dict(line.split() for line in shown.splitlines())
    assert list(jobs) == ["prepare", "reference", "proxy", "main", "report"]
    assert ended(jobs["report"], tmp_path) == "COMPLETED"
    close(alone, tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_a_stage_that_fails_takes_those_after_it_along(fresh: list[str], tmp_path: Path) -> None:
    overrides = [*fresh, f"run_dir={tmp_path / 'run'}", "training.batch_size=-1"]
    shown = call(LAUNCH / "pipeline.sh", "--ntasks=1", "--", *overrides, cwd=tmp_path)
    jobs = dict(line.split() for line in shown.splitlines())
    assert (
        ended(jobs["report"], tmp_path) == "CANCELLED"
        and field(jobs["prepare"], "ExitCode") == "2:0"
    )


def test_an_array_over_seeds_shares_a_store_and_ends_in_a_report(
    tiny: list[str], tmp_path: Path
) -> None:
    own = [override for override in tiny if not override.startswith("store=")]
    run_dir = tmp_path / "runs"
    shown = call(
        LAUNCH / "seeds.sh",
        "--array=3-4",
        "--ntasks=1",
        "--",
        *own,
        f"run_dir={run_dir}",
        cwd=tmp_path,
    )
    jobs = dict(line.split() for line in shown.splitlines())
    assert ended(jobs["report"], tmp_path) == "COMPLETED"
    assert sorted(path.parent.name for path in run_dir.glob("*/evaluation.json")) == [
        "seed-3",
        "seed-4",
    ]
    stores = {(run_dir / f"seed-{seed}" / "prepare").resolve().parent for seed in (3, 4)}
    assert stores == {(run_dir / "store" / "data").resolve()}
    assert "Over 2 runs" in (run_dir / "report.html").read_text()


def multirun(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "doremi_train", "-m", "hydra/launcher=submitit_slurm", *overrides],
        cwd=cwd, capture_output=True, text=True, timeout=420, check=False,
    )  # fmt: skip


def test_a_sweep_is_an_array_and_a_failed_job_shows_its_message(
    fresh: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "sweep"
    sweep = [*fresh, f"run_dir={run_dir}", "stage=proxy"]
    done = multirun(*sweep, "proxy.step_size=0.5,1.0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = sorted(run_dir.glob("*/proxy"))
    assert len({path.resolve() for path in made}) == 2
    assert len({path.with_name("reference").resolve() for path in made}) == 1, (
        "one reference, made once"
    )
    assert len(list((run_dir / ".submitit").glob("*_1"))) == 1, "one array"
    failed = multirun(*sweep, "training.batch_size=8,-3", cwd=tmp_path)
    assert failed.returncode == 2
    assert "training.batch_size=-3: " in failed.stderr and "Traceback" not in failed.stderr


def test_a_sweep_s_job_is_requeued_at_its_time_limit(
    uninterrupted: Path, fresh: list[str], tmp_path: Path
) -> None:
    """Submitit's own signal: the run saves first, and the job goes back into the queue after."""
    run_dir = tmp_path / "sweep"
    overrides = [*fresh, *LONG, f"run_dir={run_dir}", "stage=main", "main.comparisons=[]", "seed=0"]
    others = queue()  # a failed job of the test before may still be on its way out
    sweep = subprocess.Popen(
        [sys.executable, "-m", "doremi_train", "-m", "hydra/launcher=submitit_slurm", *overrides],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        job = first_job(sweep, others)
        wait_for(
            lambda: any(checkpoints(path) for path in run_dir.glob("*/reference")), "a checkpoint"
        )
        call("scancel", "--signal=USR2", job, cwd=tmp_path)
        out, _ = sweep.communicate(timeout=300)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, out
    assert field(job, "Restarts") == "1"
    logs = "".join(path.read_text() for path in (run_dir / ".submitit").glob("*/*_log.err"))
    assert "Caught signal SIGUSR2" in logs
    (made,) = run_dir.glob("*/weights.json")
    same_bits(uninterrupted, made.parent)


def queue() -> set[str]:
    return set(call("squeue", "-h", "-o", "%A", cwd=Path("/")).split())


def first_job(process: "subprocess.Popen[str]", others: set[str]) -> str:
    """The first in the queue that is none of `others`."""
    found: set[str] = set()

    def condition() -> bool:
        assert process.poll() is None, process.communicate()
        found.update(queue() - others)
        return bool(found)

    wait_for(condition, "a job")
    return min(found)


# ── Children ────────────────────────────────────────────────────────────────────────


def test_seeds_of_a_proxy_as_jobs_give_the_same_bytes(fresh: list[str], tmp_path: Path) -> None:
    seeds = [*fresh, "stage=main", "main.comparisons=[]", "proxy.seeds=2"]
    assert (
        run_here(
            *seeds, f"run_dir={tmp_path / 'one'}", f"store={tmp_path / 'first' / 'store'}"
        ).code
        == 0
    )
    call(
        sys.executable, "-m", "doremi_train", *seeds, f"run_dir={tmp_path / 'two'}",
        "submit.cluster=slurm", "submit.tasks_per_node=1", "submit.extra={comment: seeds}",
        cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "one" / "weights.json").read_bytes() == (
        tmp_path / "two" / "weights.json"
    ).read_bytes()
    for seed in (0, 1):
        child: Any = tmp_path / "two" / "proxy" / "round-1" / "jobs" / f"seed-{seed}"
        assert (child / "proxy").resolve() == (
            tmp_path / "two" / "proxy" / "round-1" / f"seed-{seed}"
        ).resolve()


def test_a_swarm_is_an_array(tiny: list[str], fresh: list[str], tmp_path: Path) -> None:
    swarm = [
        "mixture=swarm",
        "stage=swarm",
        "swarm.runs=1",
        "swarm.candidates=1",
        "training.steps=6",
    ]
    out = call(
        sys.executable, "-m", "doremi_train", *fresh, *swarm, f"run_dir={tmp_path / 'run'}",
        "submit.cluster=slurm", "submit.parallel=2", cwd=tmp_path,
    )  # fmt: skip
    jobs = [line.split(" is job ")[1].split()[0] for line in out.splitlines() if " is job " in line]
    assert [job.partition("_")[2] for job in jobs[:3]] == ["0", "1", "2"]  # natural, uniform, run-0
    assert len({job.partition("_")[0] for job in jobs[:3]}) == 1 and jobs[3] not in jobs[:3]
    assert run_here(*tiny, *swarm, f"run_dir={tmp_path / 'one'}").code == 0
    one, two = (tmp_path / name / "weights.json" for name in ("one", "run"))
    assert one.read_bytes() == two.read_bytes()


def test_ranks_of_one_step_submit_children_of_two_tasks(
    alone: Path, fresh: list[str], tmp_path: Path
) -> None:
    """The children inherit nothing of their parent's step, and have ranks of their own."""
    run_dir = tmp_path / "run"
    call(
        "srun", "--ntasks=2", "--nodes=1", sys.executable, "-m", "doremi_train", *fresh,
        f"run_dir={run_dir}", "stage=proxy", "proxy.seeds=2", "submit.cluster=slurm",
        "submit.tasks_per_node=2", "submit.parallel=1", cwd=tmp_path,
    )  # fmt: skip
    first = run_dir / "proxy" / "round-1" / "seed-0" / "domain_weights.jsonl"
    for a, b in zip(lines(alone / "proxy" / "domain_weights.jsonl"), lines(first), strict=True):
        assert all(abs(a["weights"][name] - b["weights"][name]) < 1e-6 for name in a["weights"])


def test_a_stopped_parent_takes_its_jobs_along(fresh: list[str], tmp_path: Path) -> None:
    assert run_here(*fresh, f"run_dir={tmp_path / 'made'}", "stage=reference").code == 0
    seeds = [
        *fresh,
        *LONG,
        "training.steps=100000",
        f"reference.path={tmp_path / 'made/reference/model'}",
    ]
    seeds += [f"run_dir={tmp_path / 'run'}", "stage=proxy", "proxy.seeds=2"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "doremi_train", *seeds, "submit.cluster=slurm", "submit.parallel=1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        folder = tmp_path / "run" / "proxy" / "round-1" / "jobs" / "seed-0" / "proxy"
        wait_for(
            lambda: parent.poll() is not None or checkpoints(folder), "a checkpoint of the child"
        )
        parent.terminate()
        out, err = parent.communicate(timeout=120)
    finally:
        parent.kill()
    assert parent.returncode == 75, (out, err)
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
    wait_for(lambda: not call("squeue", "-h", cwd=tmp_path).strip(), "an empty queue", 30)


# ── Selections ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def selection(tmp_path: Path) -> list[str]:
    """Overrides of a selection from twelve files. While there is a file `slow`, each takes as many
    seconds to read."""
    pytest.importorskip("numba")
    script = tmp_path / "read.sh"
    script.write_text(
        f'[ -e {tmp_path / "slow"} ] && sleep "$(cat {tmp_path / "slow"})"\nexec cat "$1"\n'
    )
    texts = list(documents(2, "hijklmno", 200, 100_000))
    files = [write_jsonl(tmp_path / "raw" / f"{n:02d}.jsonl", texts[n::12] * 20) for n in range(12)]
    train = ", ".join(f'"pipe:sh {script} {file}"' for file in files)
    target = write_jsonl(tmp_path / "target.jsonl", list(documents(3, "nopqrst", 300, 3000)))
    return [
        "stage=select", f"data.domains={{d: {{train: [{train}]}}}}", "data.allow_pipe=true",
        "selection=ngram", f"selection.targets={{t: [{target}]}}",
    ]  # fmt: skip


def same_choice(one: Path, two: Path) -> None:
    for name in ("result.json", "t/sidecar.parquet", "t/weights.json"):
        assert (one / "select" / name).read_bytes() == (two / "select" / name).read_bytes(), name


def counted(run_dir: Path) -> dict[Path, int]:
    """The counts that are there, and when they were written."""
    return {
        path: path.stat().st_mtime_ns for path in run_dir.glob("store/selection/*/counts/*.npz")
    }


def test_a_selection_as_an_array_that_loses_a_job_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    texts = list(documents(2, "hijklmno", 200, 100_000))
    for number in range(12):
        write_jsonl(tmp_path / "raw" / "d" / f"train-{number:02d}.jsonl", texts[number::12] * 20)
    target = write_jsonl(tmp_path / "target.jsonl", list(documents(3, "nopqrst", 300, 3000)))
    overrides = ["stage=select", f"data.root={tmp_path / 'raw'}", "selection=ngram",
                 f"selection.targets={{t: [{target}]}}"]  # fmt: skip
    assert run_here(*overrides, "selection.workers=1", f"run_dir={tmp_path / 'here'}").code == 0
    parent = subprocess.Popen(
        [sys.executable, "-m", "doremi_train", *overrides, "selection.engine=slurm",
         "selection.workers=3", f"run_dir={tmp_path / 'array'}"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        counts = (tmp_path / "array" / "store").glob
        wait_for(
            lambda: parent.poll() is not None or list(counts("selection/*/counts/*.npz")),
            "the first counts",
        )
        running = call("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i", cwd=tmp_path).split()
        assert running and all("_" in job for job in running), "an array"
        call("scancel", "--signal=KILL", running[-1], cwd=tmp_path)
        out, err = parent.communicate(timeout=300)
    finally:
        parent.kill()
    assert parent.returncode == 0, (out, err)
    same_choice(tmp_path / "here", tmp_path / "array")
    assert len(list((tmp_path / "array" / "select.log").glob("*_result.pkl"))) >= 9, (
        "three arrays of three jobs"
    )


def test_domains_made_by_arrays_are_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    pytest.importorskip("sklearn")
    planted(tmp_path / "raw", 3, 2, 40)
    overrides = ["stage=regroup", f"data.root={tmp_path / 'raw'}", "regroup.domains=4"]
    assert run_here(*overrides, "regroup.workers=1", f"run_dir={tmp_path / 'here'}").code == 0
    array = ["regroup.engine=slurm", "regroup.workers=2", f"run_dir={tmp_path / 'array'}"]
    outcome = run_here(*overrides, *array)
    assert outcome.code == 0, outcome
    for name in ("result.json", "domains.json", "model.npz", "sidecar.parquet"):
        here, there = (tmp_path / run / "regroup" / name for run in ("here", "array"))
        assert here.read_bytes() == there.read_bytes(), name
    logs = tmp_path / "array" / "regroup.log"
    assert [*logs.glob("*_result.pkl")]
    assert logs.stat().st_mode & 0o777 == 0o700  # as their owner's alone
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in logs.glob("*_submitted.pkl"))


def test_a_selection_s_job_is_requeued_at_its_time_limit(
    selection: list[str], tmp_path: Path
) -> None:
    """A real one, of two minutes, whose signal comes a minute before; what was done is not done
    again."""
    assert run_here(*selection, "selection.workers=1", f"run_dir={tmp_path / 'here'}").code == 0
    (tmp_path / "slow").write_text("15")
    parent = subprocess.Popen(
        [sys.executable, "-m", "doremi_train", *selection, "selection.engine=slurm",
         "selection.workers=2", "submit.timeout_minutes=2", f"run_dir={tmp_path / 'array'}"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(
            lambda: parent.poll() is not None or counted(tmp_path / "array"), "the first counts"
        )
        job = call("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%i", cwd=tmp_path).split()[0]
        wait_for(lambda: field(job, "Restarts") == "1", "the second start", 120)
        before = counted(tmp_path / "array")
        assert 0 < len(before) < 12
        (tmp_path / "slow").unlink()
        out, err = parent.communicate(timeout=300)
    finally:
        parent.kill()
    assert parent.returncode == 0, (out, err)
    same_choice(tmp_path / "here", tmp_path / "array")
    after = counted(tmp_path / "array")
    assert len(after) == 12 and before.items() <= after.items()
    logs = "".join(
        path.read_text() for path in (tmp_path / "array" / "select.log").glob("*_log.err")
    )
    assert "Caught signal SIGUSR2" in logs and "timed-out" in logs


def test_a_selection_that_is_told_to_stop_is_requeued_too(
    selection: list[str], tmp_path: Path
) -> None:
    """The whole of it as one job."""
    assert run_here(*selection, "selection.workers=1", f"run_dir={tmp_path / 'here'}").code == 0
    (tmp_path / "slow").write_text("4")
    run_dir = tmp_path / "run"
    job = submit(
        LAUNCH / "stage.sbatch",
        *selection,
        "selection.workers=2",
        f"run_dir={run_dir}",
        cwd=tmp_path,
    )
    wait_for(lambda: counted(run_dir), "the first counts")
    call("scancel", "--signal=USR1", job, cwd=tmp_path)  # as Slurm does before a time limit
    wait_for(lambda: field(job, "Restarts") == "1", "the second start")
    before = counted(run_dir)
    assert 0 < len(before) < 12
    (tmp_path / "slow").unlink()
    assert ended(job, tmp_path) == "COMPLETED"
    same_choice(tmp_path / "here", run_dir)
    assert before.items() <= counted(run_dir).items()


def test_an_array_shares_the_scores_of_one_pool(tmp_path: Path) -> None:
    """LESS: whichever task is there first warms up, both score, and either has the same choice in
    the end."""
    pytest.importorskip("numba")
    from benchmarks import planted_tasks

    planted_tasks.untrained(tmp_path / "model", width=32)
    # Three shards of scores.
    planted_tasks.write(tmp_path / "pool.jsonl", planted_tasks.records(1, 240, 0.2))
    planted_tasks.write(tmp_path / "held.jsonl", planted_tasks.records(2, 2, 0.0))
    planted_tasks.write(tmp_path / "amber.jsonl", planted_tasks.records(3, 6, 0.0, ("amber",)))
    split = f"{{train: [{tmp_path}/pool.jsonl], validation: [{tmp_path}/held.jsonl]}}"
    overrides = [
        "stage=select", "selection=less", f"selection.targets={{amber: [{tmp_path}/amber.jsonl]}}",
        f"finetune.model={tmp_path}/model", "finetune.lora.rank=null", "data.embedded=null",
        f"data.domains={{pool: {split}}}", f"store={tmp_path}/store", *planted_tasks.TRAINING,
        "training.batch_size=16", "selection.less.epochs=2", "selection.less.baselines=[random]",
    ]  # fmt: skip
    run_dir = f"run_dir={tmp_path}/run-$SLURM_ARRAY_TASK_ID"
    words = " ".join(f"'{override}'" for override in overrides)
    job = submit(
        "--array=0-1", f"--wrap={sys.executable} -m doremi_train {words} {run_dir}", cwd=tmp_path
    )
    wait_for(lambda: not call("squeue", "-h", cwd=tmp_path).strip(), "an empty queue", 300)
    told = "\n".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    for task in (0, 1):
        assert field(f"{job}_{task}", "JobState") == "COMPLETED", told
    one, two = (tmp_path / f"run-{task}" / "select" for task in (0, 1))
    assert (one / "amber/less.jsonl").read_bytes() == (two / "amber/less.jsonl").read_bytes()
    (scores,) = (tmp_path / "store" / "selection").glob("less-*")
    assert [len(list(epoch.glob("*.npy"))) for epoch in sorted(scores.iterdir())] == [3, 3]
