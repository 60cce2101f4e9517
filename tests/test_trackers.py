"""What wandb and TensorBoard hold, read back from their own files, is what the JSON lines hold.
They harm nothing."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from helpers.command import ROOT, Command, environment, run_here, start
from helpers.processes import ended, lines, reached, read, reaped, same_bits, wait_for

from doremi_train import trackers
from doremi_train.config import UserError
from doremi_train.stages.options import Config, identity
from doremi_train.trackers import Tracking, TrackingOptions, flat

KEY = "0123456789abcdef" * 3  # of the right form, and nobody's


@pytest.fixture(autouse=True, scope="module")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Nobody is logged in, whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("nobody")
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(home))
        yield patch


# ── Reading back ────────────────────────────────────────────────────────────────────


class Kept(NamedTuple):
    """One wandb run as its file has it, in its own words."""

    run: dict[str, Any]
    history: list[dict[str, Any]]  # without wandb's own columns
    summary: dict[str, Any]
    artifacts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    exit_code: int | None


def inspect(path: Path) -> Kept:
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    records = [json.loads(line) for line in shown.stdout.splitlines()]
    of: Callable[[str], list[Any]] = lambda kind: [r[kind] for r in records if r["type"] == kind]  # noqa: E731
    history = [
        {k: v for k, v in row["item"].items() if not k.startswith("_")} for row in of("history")
    ]
    summary: dict[str, Any] = {}
    for update in of("summary"):
        summary |= update["update"]
    ends = of("exit")
    return Kept(
        of("run")[0],
        history,
        summary,
        of("artifact"),
        of("metric"),
        ends[-1]["exit_code"] if ends else None,
    )


def wandb_runs(folder: Path) -> list[Kept]:
    """Every wandb run below `folder/wandb`, oldest first."""
    return [
        inspect(next(run.glob("*.wandb")))
        for run in sorted((folder / "wandb").glob("offline-run-*"))
    ]


def named(runs: list[Kept], name: str) -> list[Kept]:
    return [kept for kept in runs if kept.run["display_name"] == name]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def logged(run: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a run, flat, one log after another."""
    for name in ("metrics", "evaluations", "domain_weights"):
        if (run / f"{name}.jsonl").exists():
            yield from map(flat, lines(run / f"{name}.jsonl"))


def services() -> list[int]:
    """wandb's own processes that this one started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [
        int(pid) for pid in children if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()
    ]


def same_curves(kept: list[dict[str, Any]], run: Path) -> None:
    """The same rows, bit by bit; the logs are interleaved in the tracker."""
    key = lambda row: (sorted(row), row["step"])  # noqa: E731
    assert sorted(kept, key=key) == sorted(logged(run), key=key)


# ── A whole job, in wandb without an account ────────────────────────────────────────


@pytest.fixture(scope="module")
def job(tiny: list[str], tmp_path_factory: pytest.TempPathFactory, doremi: Command) -> Path:
    """A tracked pipeline in a store of its own, started where nothing may be left."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "cwd").mkdir()
    more = [
        "tracking=wandb",
        "tracking.tags=[small, fast]",
        "submit.extra={url: 'https://me:s3cr3t@h/x?token=s3cr3t'}",
    ]
    outcome = doremi(
        *tiny, *more, f"run_dir={folder / 'run'}", f"store={folder / 'store'}", cwd=folder / "cwd"
    )
    assert outcome.code == 0, outcome
    assert not list((folder / "cwd").iterdir())
    assert "wandb: offline, " in outcome.out and "wandb" not in outcome.err, outcome
    return folder / "run"


@pytest.fixture(scope="module")
def runs(job: Path) -> list[Kept]:
    return wandb_runs(job)


@pytest.mark.slow
def test_every_training_run_is_one_of_the_group(runs: list[Kept]) -> None:
    found = {
        kept.run["display_name"]: kept.run["job_type"]
        for kept in runs
        if kept.run["job_type"] != "report"
    }
    # Baseline is there.
    assert found == {
        "reference": "reference",
        "proxy": "proxy",
        "main": "main",
        "uniform": "main",
    }
    for kept in runs:
        assert (kept.run["run_group"], kept.run["project"], kept.run["tags"]) == (
            "run",
            "doremi-train",
            ["small", "fast"],
        )
        assert kept.exit_code == 0 and kept.run["resume"]
    assert len({kept.run["run_id"] for kept in runs}) == len(runs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reference", "proxy", "main", "uniform"])
def test_the_curves_are_the_json_lines(name: str, job: Path, runs: list[Kept]) -> None:
    (kept,) = named(runs, name)
    same_curves(kept.history, job / name)
    assert kept.metrics == [
        {"glob_name": "*", "options": kept.metrics[0]["options"], "step_metric": "step"}
    ]


@pytest.mark.slow
def test_the_whole_configuration_is_there(job: Path, runs: list[Kept]) -> None:
    config = yaml.safe_load((job / "config.yaml").read_text())
    for kept in runs:
        assert {k: v for k, v in kept.run["config"]["update"].items() if k != "_wandb"} == config
    assert config["submit"]["extra"] == {"url": "https://***@h/x?token=***"}


@pytest.mark.slow
def test_no_secret_is_in_any_file(job: Path) -> None:
    """Neither of the configuration nor of the command line, which had one."""
    held = [path for path in job.rglob("*") if path.is_file() and b"s3cr3t" in path.read_bytes()]
    assert held == []


@pytest.mark.slow
def test_the_summary_holds_the_final_numbers(job: Path, runs: list[Kept]) -> None:
    for name in ("reference", "proxy", "main"):
        (kept,) = named(runs, name)
        result = read(job / name / "result.json")
        for figure in ("mean_loss", "worst_loss"):
            assert kept.summary[figure] == result["evaluation"][figure]
        for domain, weight in result.get("weights", {}).items():
            assert kept.summary[f"learned_weights/{domain}"] == weight
    assert "learned_weights/rich" in named(runs, "proxy")[0].summary


@pytest.mark.slow
def test_tracked_or_not_the_bits_are_the_same(tiny: list[str], job: Path, tmp_path: Path) -> None:
    """And changing it afterwards is no change of the run."""
    untracked = [*tiny, f"run_dir={tmp_path / 'run'}", f"store={tmp_path / 'store'}"]
    assert run_here(*untracked).code == 0
    assert not (tmp_path / "run" / "wandb").exists()
    same_bits(tmp_path / "run", job)
    again = run_here(*untracked, "stage=main", "tracking=tensorboard", "tracking.group=x")
    assert again.code == 0 and "reference              is in the store already" in again.out


@pytest.mark.slow
def test_the_report_is_an_artifact(job: Path) -> None:
    before = set((job / "wandb").glob("offline-run-*"))
    Tracking(TrackingOptions(backend="wandb"), job, {"seed": 0}).report(job / "report.html")
    (new,) = set((job / "wandb").glob("offline-run-*")) - before
    kept = inspect(next(new.glob("*.wandb")))
    assert (kept.run["job_type"], kept.run["run_group"]) == ("report", "run")
    (artifact,) = kept.artifacts
    assert artifact["type"] == "report" and artifact["name"] == kept.run["run_id"]
    held = {file["path"]: Path(file["local_path"]) for file in artifact["manifest"]["contents"]}
    assert held.keys() == {"report.html", "weights.json", "evaluation.json", "plan.json"}
    # Copies, under run_dir: a later report does not change them before they are sent.
    for (
        name,
        copy,
    ) in held.items():
        assert job in copy.parents and copy.read_bytes() == (job / name).read_bytes()
    evaluation, weights = read(job / "evaluation.json"), read(job / "weights.json")["weights"]
    assert {
        f"mean_loss/{name}": model["mean_loss"] for name, model in evaluation.items()
    }.items() <= kept.summary.items()
    assert {
        f"weights/{name}": weight for name, weight in weights.items()
    }.items() <= kept.summary.items()


@pytest.mark.acceptance
def test_offline_nothing_talks_to_a_network(fresh: list[str], tmp_path: Path) -> None:
    """Every connect() of the command and of wandb's own process, seen by the kernel."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    seen = tmp_path / "seen"
    command = [sys.executable, "-m", "doremi_train", *fresh, "stage=reference", "tracking=wandb"]
    trace = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(seen)]
    done = subprocess.run(
        [*trace, *command, f"run_dir={tmp_path / 'run'}"],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("this machine lets nobody trace")
    assert done.returncode == 0, done
    calls = seen.read_text()
    assert "AF_UNIX" in calls  # wandb's own process, which the trace therefore follows
    assert "AF_INET" not in calls, re.findall(r".*AF_INET.*", calls)[:5]
    assert len(wandb_runs(tmp_path / "run")) == 1


# ── Stopped, killed, broken ─────────────────────────────────────────────────────────


@pytest.mark.acceptance
def test_told_to_stop_it_closes_and_continues_the_same_wandb_run(
    uninterrupted: Path, doremi: Command, prepared: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*prepared, f"run_dir={run_dir}", "stage=proxy", "tracking=wandb"]
    process = start(*overrides)
    with reaped(process):
        wait_for(lambda: reached(run_dir / "proxy", 7), process)
        process.send_signal(signal.SIGTERM)
        outcome = ended(process)
    assert outcome.code == 75, outcome
    outcome = doremi(*overrides)
    assert outcome.code == 0, outcome
    for name in ("domain_weights.jsonl", "evaluations.jsonl", "model/model.safetensors"):
        assert (run_dir / "proxy" / name).read_bytes() == (
            uninterrupted / "proxy" / name
        ).read_bytes(), name
    first, second = named(wandb_runs(run_dir), "proxy")
    assert first.run["run_id"] == second.run["run_id"] and second.run["resume"]
    assert (first.exit_code, second.exit_code) == (75, 0)
    same_curves(first.history + second.history, run_dir / "proxy")


@pytest.mark.acceptance
def test_killed_tensorboard_curves_are_not_doubled(
    prepared: list[str], doremi: Command, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = [
        *prepared,
        f"run_dir={run_dir}",
        "stage=proxy",
        "tracking=tensorboard",
        "training.checkpoint_every=20",
    ]
    process = start(*overrides)
    with reaped(process):
        wait_for(lambda: reached(run_dir / "proxy", 20), process)
        trace = run_dir / "proxy" / "domain_weights.jsonl"
        wait_for(lambda: len(lines(trace)) > 25, process)
        time.sleep(0.1)
        process.kill()
        ended(process)
    assert len(lines(trace)) > 20
    assert doremi(*overrides).code == 0
    found = scalars(run_dir / "tensorboard" / "proxy")
    for name in ("weights/rich", "excess_loss/rich"):
        assert [step for step, _ in found[name]] == list(range(1, 61))
    same_tensorboard(found, run_dir / "proxy")


def same_tensorboard(found: dict[str, list[tuple[int, float]]], run: Path) -> None:
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in logged(run):
        for name in line.keys() - {"step"}:
            expected.setdefault(name, []).append((line["step"], float(np.float32(line[name]))))
    assert found == expected


@pytest.mark.slow
def test_when_wandb_s_process_dies_the_training_does_not(
    prepared: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    def kill() -> None:
        while not reached(run_dir / "reference", 7):
            time.sleep(0.01)
        (service,) = services()
        os.kill(service, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    outcome = run_here(*prepared, f"run_dir={run_dir}", "stage=proxy", "tracking=wandb")
    killer.join(1)
    assert outcome.code == 0 and not killer.is_alive(), outcome
    assert (
        outcome.out.count("tracking ends, the run goes on") == 1 and "Traceback" not in outcome.err
    ), outcome
    assert [line["step"] for line in lines(run_dir / "reference" / "metrics.jsonl")][-1] == 60


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["wandb", "tensorboard"])
def test_a_folder_that_cannot_be_written_is_said_once(
    backend: str, tiny: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / backend).write_text("in the way")
    own = [f"run_dir={run_dir}", f"store={tmp_path / 'store'}"]
    outcome = run_here(*tiny, *own, "stage=main", "main.comparisons=[]", f"tracking={backend}")
    assert outcome.code == 0, outcome
    assert outcome.out.count(f"tracking={backend}: ") == 1 and "the run goes on" in outcome.out, (
        outcome.out
    )
    assert (run_dir / "main/model/model.safetensors").exists()


@pytest.mark.slow
def test_logged_in_without_a_network_the_training_goes_on(
    fresh: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "API_KEY": KEY,
        "BASE_URL": "http://127.0.0.1:9",
        "INIT_TIMEOUT": "2",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    outcome = run_here(*fresh, f"run_dir={tmp_path / 'run'}", "stage=reference", "tracking=wandb")
    assert outcome.code == 0, outcome
    assert outcome.out.count("tracking=wandb: ") == 1 and KEY not in outcome.out + outcome.err
    held = [
        path
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and KEY.encode() in path.read_bytes()
    ]
    assert held == []


# ── Processes, children, sweeps ─────────────────────────────────────────────────────


@pytest.mark.acceptance
def test_two_processes_are_one_run(fresh: list[str], doremi: Command, tmp_path: Path) -> None:
    overrides = [*fresh, f"run_dir={tmp_path / 'run'}", "stage=reference", "tracking=wandb"]
    outcome = doremi(*overrides, processes=2)
    assert outcome.code == 0, outcome
    assert outcome.out.count("wandb: offline, ") == 1
    (kept,) = wandb_runs(tmp_path / "run")
    same_curves(kept.history, tmp_path / "run" / "reference")


@pytest.mark.acceptance
def test_children_stand_in_their_parent_s_group_and_folder(
    fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    seeds = ["stage=proxy", "proxy.seeds=2", "submit.cluster=local", "tracking=wandb"]
    outcome = doremi(*fresh, *seeds, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome
    kept = wandb_runs(tmp_path / "run")
    names = [f"proxy/round-1/jobs/seed-{seed}/proxy" for seed in (0, 1)]
    assert sorted(run.run["display_name"] for run in kept) == [*names, "reference"]
    assert {run.run["run_group"] for run in kept} == {"run"}
    for name in names:
        same_curves(named(kept, name)[0].history, tmp_path / "run" / name)


@pytest.mark.slow
def test_jobs_of_a_sweep_stand_in_its_folder_each_by_its_name(
    fresh: list[str], tmp_path: Path
) -> None:
    sweep = [
        "-m",
        *fresh,
        f"run_dir={tmp_path / 'sweep'}",
        "stage=reference",
        "seed=0,1",
        "tracking=tensorboard",
    ]
    assert run_here(*sweep).code == 0
    for seed in (0, 1):
        (run_dir,) = (tmp_path / "sweep").glob(f"*seed={seed}*/reference")
        shown = scalars(tmp_path / "sweep" / "tensorboard" / run_dir.parent.name / "reference")
        same_tensorboard(shown, run_dir)


# ── What is asked for ───────────────────────────────────────────────────────────────


def test_online_without_a_login_is_refused_before_anything_is_written(
    tiny: list[str], tmp_path: Path
) -> None:
    outcome = run_here(
        *tiny, f"run_dir={tmp_path / 'run'}", "tracking=wandb", "tracking.mode=online"
    )
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    assert (
        "tracking.mode=online: no login was found" in outcome.err and "WANDB_API_KEY" in outcome.err
    )
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed_is_refused_with_the_remedy(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the interpreter has what cannot be imported.
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    outcome = run_here(*tiny, f"run_dir={tmp_path / 'run'}", "tracking=tensorboard")
    assert outcome.code == 2 and "'.[tensorboard]'" in outcome.err, outcome
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "key", "environment", "mode"),
    [
        ("auto", "", "", "offline"),
        ("auto", "short", "", "offline"),  # no key has this form
        ("auto", KEY, "", None),  # online, unless wandb's own settings say something else
        ("auto", KEY, "offline", None),
        ("auto", "", "disabled", None),
        ("auto", "", "online", "offline"),
        ("offline", KEY, "", "offline"),
        ("online", KEY, "", "online"),
        ("online", "short", "", UserError),
        ("online", "", "online", UserError),
    ],
)
def test_who_is_logged_in_is_online(
    asked: Any,
    key: str,
    environment: str,
    mode: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WANDB_API_KEY": key, "WANDB_MODE": environment}.items():
        if value:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("talks to a network"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    with trackers._contained(tmp_path):
        if mode is UserError:
            with pytest.raises(UserError, match="tracking.mode=online"):
                trackers._mode(TrackingOptions(mode=asked))
        else:
            assert trackers._mode(TrackingOptions(mode=asked)) == mode


def test_a_login_in_netrc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with trackers._contained(tmp_path):
        assert trackers._mode(TrackingOptions(mode="online")) == "online"


def test_wandb_switched_off_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracking(TrackingOptions(backend="wandb"), tmp_path, {}).run("main", "x") as tracked:
        tracked.line({"step": 1, "loss": 2.0})
        tracked.summary({"mean_loss": 2.0})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_tracking_is_no_part_of_what_is_computed() -> None:
    assert identity({"seed": 1, "tracking": {"backend": "wandb", "tags": ["x"]}}) == {"seed": 1}


def test_defaults_of_the_yaml_are_those_of_the_dataclass() -> None:
    from test_conventions import compose

    from doremi_train.config import load

    assert load(Config, compose()).tracking == TrackingOptions()


# ── Two backends, the same lines ────────────────────────────────────────────────────

ODD = (
    "a/b",
    "a",
    "x.y",
    "ü ñ 中",
    "<script>alert(1)</script>",
    "back\\slash",
    "line\nbreak",
    "*",
    "_step",
    "%2F",
    "$x$",
)


def write(backend: Any, folder: Path) -> list[dict[str, Any]]:
    """Three steps over domains with odd names; returns what was written, flat."""
    kept = []
    with Tracking(
        TrackingOptions(backend=backend, name="odd"), folder, {"a": {"b.c": [1, None]}}
    ).run("proxy", "odd-1") as run:
        for step in (1, 2, 3):
            columns = {
                key: {name: step / (3 + k) for k, name in enumerate(ODD)}
                for key in ("weights", "excess_loss")
            }
            line = {
                "step": step,
                **columns,
                "tokens": dict.fromkeys(ODD, 7 * step),
                "skipped": True,
            }
            run.line(line)
            kept.append(flat(line))
        run.line({"step": 3, "mean_loss": 1.5, "domains": dict.fromkeys(ODD, 0.1)})
        kept.append({"step": 3, "mean_loss": 1.5, **{f"domains/{name}/loss": 0.1 for name in ODD}})
    return kept


@pytest.mark.slow
def test_odd_names_of_domains_are_kept_apart_in_wandb(tmp_path: Path) -> None:
    written = write("wandb", tmp_path / "run")
    (kept,) = wandb_runs(tmp_path / "run")
    assert kept.history == written
    assert (kept.run["display_name"], kept.run["job_type"], kept.run["run_id"]) == (
        "odd/proxy",
        "proxy",
        "odd-1",
    )
    assert kept.run["config"]["update"]["a"] == {"b.c": [1, None]}


def test_odd_names_of_domains_are_kept_apart_in_tensorboard(tmp_path: Path) -> None:
    written = write("tensorboard", tmp_path)
    found = scalars(tmp_path / "tensorboard" / "odd" / "proxy")
    for row in written:
        for name in row.keys() - {"step"}:
            assert (row["step"], float(np.float32(row[name]))) in found[name]
    assert found.keys() == {name for row in written for name in row} - {"step"}


def test_steps_that_come_again_replace_those_of_a_killed_run(tmp_path: Path) -> None:
    shown = Tracking(TrackingOptions(backend="tensorboard"), tmp_path, {})
    with pytest.raises(RuntimeError), shown.run("proxy", "x") as tracked:
        for step in range(1, 26):
            tracked.line({"step": step, "loss": 1.0})
        raise RuntimeError("after a checkpoint of step 20")
    with shown.run("proxy", "x", step=20) as tracked:
        for step in range(21, 31):
            tracked.line({"step": step, "loss": 2.0})
    assert scalars(tmp_path / "tensorboard/proxy")["loss"] == [
        (step, 1.0 + (step > 20)) for step in range(1, 31)
    ]


@pytest.mark.parametrize("backend", ["wandb", "tensorboard"])
def test_tracking_leaves_the_process_as_it_was(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def state() -> list[Any]:
        handlers = [
            signal.getsignal(number) for number in signal.valid_signals() if number not in (9, 19)
        ]
        draws = [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]  # noqa: NPY002
        return [
            *draws,
            handlers,
            sys.exit,
            sys.excepthook,
            sys.stdout,
            dict(os.environ),
            Path.cwd(),
        ]

    if backend == "wandb":
        __import__("wandb")  # the import itself sets a variable of its own
    before = state()
    write(backend, tmp_path / "run")
    assert state() == before
    assert not list((tmp_path / "cwd").iterdir())
    assert services() == []


@pytest.mark.slow
def test_backends_are_imported_only_when_asked_for() -> None:
    code = "import sys, doremi_train.stages, doremi_train.stages.report; print(*sys.modules)"
    modules = subprocess.check_output(
        [sys.executable, "-c", code], env=environment(), text=True, cwd=ROOT
    ).split()
    assert "doremi_train.trackers" in modules
    assert not {"wandb", "tensorboard"} & {name.partition(".")[0] for name in modules}


def test_the_stage_of_a_run_is_found_by_its_name() -> None:
    labels = {
        "reference": "reference",
        "proxy": "proxy",
        "proxy/round-2/seed-0": "proxy",
        "baseline": "main",
        "proxy/round-2/reference": "reference",
        "main": "main",
    }
    assert {label: trackers._stage(label) for label in labels} == labels
