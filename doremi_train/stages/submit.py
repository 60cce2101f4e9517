"""Child runs side by side, each the command itself on a configuration of its own: processes here, or a Slurm array.

What a child computes is found by its content address afterwards, so a child that was done before is not sent again, and
the parent needs nothing from a child but that it ended well.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from doremi_train.config import UserError
from doremi_train.parallel import comm, slurm
from doremi_train.stages.options import Submit
from doremi_train.stages.session import Session
from doremi_train.storage import runs
from doremi_train.storage.runs import Preempted
from doremi_train.train import TrainingFailed

_MINUTES_OF_A_YEAR = 525_600
SECONDS_BETWEEN_LOOKS = 10.0  # into Slurm's queue
_LINES_OF_A_LOG = 15


class Again(Protocol):
    """What submitit calls, and calls again after a time limit; it returns an exit code and a message."""

    def __call__(self) -> tuple[int, str]: ...

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        slurm.outlive_requeue()
        return DelayedSubmission(self)


@dataclass(frozen=True)
class Child(Again):
    """A composed configuration, and what runs it."""

    run: Callable[[dict[str, Any]], tuple[int, str]]
    plain: Mapping[str, Any]

    def __call__(self) -> tuple[int, str]:
        return self.run(dict(self.plain))


def submit(
    session: Session, children: Mapping[str, Mapping[str, Any]], watch: Callable[[], None] = lambda: None
) -> None:
    """Run composed configurations, named for messages, `submit.parallel` at a time; return when all ended well.
    `watch` is called now and then meanwhile.

    Raises Preempted when told to stop, after the children saved, and the error of the first child that failed, after
    the others saved. Called on every rank; rank 0 submits.
    """
    comm.on_first(lambda: _submit(session, children, watch))


def configured(session: Session, folder: Path, **changes: Any) -> dict[str, Any]:
    """This session's configuration for a child with a run_dir of its own; a change is a key such as "proxy.seeds"."""
    places = {"run_dir": str(folder), "store": str(session.store.resolve()), "submit.cluster": "none"}
    places |= session.tracking.of_part(folder.relative_to(session.run_dir).as_posix())
    plain = {name: dict(part) if isinstance(part, Mapping) else part for name, part in session.plain.items()}
    for key, value in (places | changes).items():
        group, _, name = key.rpartition(".")
        (plain[group] if group else plain)[name] = value
    return plain


def _submit(session: Session, children: Mapping[str, Mapping[str, Any]], watch: Callable[[], None]) -> None:
    options = session.config.submit
    waiting, running = dict(children), dict[str, tuple[Any, int]]()  # running: a job, and its slot
    slots = list(range(options.parallel))
    failure: Exception | None = None
    looked = told = 0.0
    if options.cluster == "slurm" and waiting:
        for name, job in _array(session, waiting).items():
            running[name] = job, 0
            session.say(f"{name:<22} is job {job.job_id} (slurm)")
        waiting = {}
    while running or (waiting and not failure):
        while waiting and slots and not failure:
            name = next(iter(waiting))
            running[name] = _start(session, waiting.pop(name), slots[-1]), slots.pop()
            session.say(f"{name:<22} is job {running[name][0].job_id} (local)")
        look = time.monotonic() > looked + SECONDS_BETWEEN_LOOKS
        looked = time.monotonic() if look else looked
        for name, (job, slot) in list(running.items()):
            if ended(job, look):
                failure = failure or failure_of(name, job)
                slots.append(slot)
                del running[name]
        if runs.stop.requested:
            failure = failure or Preempted("told to stop; the jobs saved, and the same command continues them")
        if failure and time.monotonic() > told + 2:  # again and again: a child that is just starting does not listen
            told = time.monotonic()
            for job, _ in running.values():
                _stop(job)
        watch()
        time.sleep(0.2)
    if failure:
        raise failure


def _start(session: Session, plain: Mapping[str, Any], slot: int) -> Any:
    """One child as a process here."""
    import submitit

    options = session.config.submit
    folder = Path(plain["run_dir"])
    logs = folder.with_name(f"{folder.name}.log")
    for old in logs.glob("*_result.pkl"):  # a process number comes again
        old.unlink()
    gpus = range(options.gpus_per_node * slot, options.gpus_per_node * (slot + 1))
    with clean_environment():
        executor = submitit.LocalExecutor(logs)
        executor.update_parameters(
            timeout_min=_MINUTES_OF_A_YEAR,
            tasks_per_node=options.tasks_per_node,
            gpus_per_node=len(gpus),
            visible_gpus=gpus,
        )
        return executor.submit(Child(session.child, plain))


def _array(session: Session, children: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All children as one array of Slurm, `submit.parallel` of them at once."""
    options = session.config.submit
    logs = Path(next(iter(children.values()))["run_dir"]).with_name("array.log")
    with clean_environment(), slurm_refusals():
        executor = slurm_executor(options, logs, options.nodes, options.tasks_per_node, options.gpus_per_node)
        executor.update_parameters(array_parallelism=options.parallel)
        with executor.batch():
            return {name: executor.submit(Child(session.child, plain)) for name, plain in children.items()}


@contextlib.contextmanager
def clean_environment() -> Iterator[None]:
    """A child is no rank of its parent, and no step of its job."""
    import submitit

    keep = {name: os.environ[name] for name in os.environ if name == "SLURM_CONF"}
    agent = [name for name in os.environ if name.startswith("TORCHELASTIC_")]
    with submitit.helpers.clean_env(extra_names=agent):
        os.environ.update(keep)
        yield


def slurm_executor(options: Submit, logs: Path, nodes: int, tasks: int, gpus: int) -> Any:
    """An executor of jobs of so many nodes, tasks and GPUs of each."""
    import submitit

    executor = submitit.SlurmExecutor(logs, max_num_timeout=1000)
    given = {"gpus_per_node": gpus, "cpus_per_task": options.cpus_per_task, "partition": options.partition}
    executor.update_parameters(
        job_name="doremi-train",
        time=options.timeout_minutes,
        nodes=nodes,
        ntasks_per_node=tasks,
        signal_delay_s=min(120, options.timeout_minutes * 30),
        additional_parameters=dict(options.extra or {}),
        **{name: value for name, value in given.items() if value},
    )
    return executor


@contextlib.contextmanager
def slurm_refusals() -> Iterator[None]:
    """Raises UserError where there is no Slurm, or it takes no job."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"submit: Slurm took no job: {error}; sbatch must be here, and allow submit.partition, .extra and the like"
        ) from None


def ended(job: Any, look: bool) -> bool:
    """Whether a job ended, with a result or not; `look`: also in the queue, since not every Slurm keeps accounts."""
    if hasattr(job, "_process"):
        return job._process.poll() is not None
    if all(job.task(number).paths.result_pickle.exists() for number in range(job.num_tasks)):
        return True
    if not look:
        return False
    shown = subprocess.run(["squeue", "-h", "-j", job.job_id, "-o", "%T"], capture_output=True, text=True, check=False)
    if shown.returncode:  # any other error: the controller is away for a while
        return "Invalid job id" in shown.stderr
    return not shown.stdout.strip()


def failure_of(name: str, job: Any) -> Exception | None:
    """What went wrong in a job that ended, named by the child, or nothing."""
    from submitit.core.utils import UncompletedJobError

    first = job.task(0)
    if not has_result(job):
        return TrainingFailed(f"{name}: job {job.job_id} ended without a result, as when it is killed{_log(first)}")
    try:
        code, message = first.result()
    except UncompletedJobError:
        return TrainingFailed(f"{name}: job {job.job_id} failed{_log(first)}")
    kinds = {0: None, Preempted.exit_code: Preempted, UserError.exit_code: UserError}
    kind = kinds.get(code, TrainingFailed)
    return kind(f"{name}: {message}{_log(first) if kind is TrainingFailed else ''}") if kind else None


def has_result(job: Any) -> bool:
    """Whether a job that ended left a result; a file of another machine may be seen a while later."""
    for _ in range(50):
        if job.task(0).paths.result_pickle.exists():
            return True
        time.sleep(0.2)
    return False


def _log(task: Any) -> str:
    """The end of a task's log, and where it is."""
    for path in (task.paths.stderr, task.paths.stdout):
        text = path.read_text(errors="replace").strip() if path.exists() else ""
        if text:
            return f"; {path} ends with\n" + "\n".join(text.splitlines()[-_LINES_OF_A_LOG:])
    return f"; it left no log ({task.paths.stderr})"


def _stop(job: Any) -> None:
    """Tell a job to save and stop; one that has not started is taken out of the queue."""
    if hasattr(job, "_process"):
        job._process.send_signal(signal.SIGTERM)  # which hands it to its tasks
        return
    for how in ("--state=PENDING", "--signal=TERM"):
        subprocess.run(["scancel", "--quiet", how, job.job_id], capture_output=True, check=False)
