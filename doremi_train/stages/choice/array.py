"""The engine that runs the tasks of a stage, of which that by arrays of Slurm jobs is here."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doremi_train.config import UserError
from doremi_train.console import Bar
from doremi_train.selection.documents import engines
from doremi_train.selection.documents.engines import LOSSES
from doremi_train.selection.options import SelectionOptions
from doremi_train.selection.regroup.options import RegroupOptions
from doremi_train.stages.options import Submit
from doremi_train.stages.runs import jobs
from doremi_train.stages.runs.jobs import Again
from doremi_train.stages.runs.submit import SECONDS_BETWEEN_LOOKS
from doremi_train.stages.session import Session
from doremi_train.storage.runs import stop
from doremi_train.training.task import TrainingFailed


@contextlib.contextmanager
def engine(session: Session, stage: str) -> Iterator[engines.Engine]:
    """The engine that runs the tasks of `stage`, which is select or regroup."""
    config = session.config
    options: SelectionOptions | RegroupOptions
    group, options = (
        ("regroup", config.regroup) if stage == "regroup" else ("selection", config.selection)
    )
    if options.engine == "slurm":
        yield Array(config.submit, session.run_dir / f"{stage}.log", options.workers, group)
    elif options.engine == "ray":
        with engines.Ray(options.workers, group) as ray:
            session.say(f"Ray of {ray.nodes} node{'s' if ray.nodes > 1 else ''}")
            yield ray
    else:
        with engines.Processes(options.workers, group) as pool:
            yield pool


def everywhere(
    pool: engines.Engine, stage: str, what: str, work: Callable[[Any], object], jobs: list[Any]
) -> None:
    """Run the tasks of a stage, with a bar that says `what` they do."""
    with Bar(f"{stage}: {what}", max(len(jobs), 1), unit="files") as bar:

        def look(done: int) -> None:
            stop.check(stage)
            if done:
                bar.update(done)

        pool.run(work, jobs, look)


@dataclass(frozen=True)
class Share(Again):
    """Tasks for one job of an array, one after the other. After a time limit it begins anew: done
    is not done again."""

    work: Callable[[Any], object]
    tasks: Sequence[Any]

    def __call__(self) -> tuple[int, str]:
        try:
            for task in self.tasks:
                self.work(task)
        except UserError as error:
            return error.exit_code, str(error)
        return 0, ""


@dataclass(frozen=True)
class Array:
    """An engine (`selection.documents.engines`): shares of its tasks as arrays of Slurm jobs."""

    options: Submit
    logs: Path
    jobs: int | None  # of an array; None: `submit.parallel`
    group: str = "selection"  # of the keys that messages name

    def run(
        self, work: Callable[[Any], object], tasks: Sequence[Any], look: Callable[[int], None]
    ) -> None:
        """Raises the error of the first job that failed, and TrainingFailed where jobs are lost
        again and again."""
        count, lost = min(self.jobs or self.options.parallel, len(tasks)), 0
        left = [Share(work, tasks[first::count]) for first in range(count)]
        while left:
            before = len(left)
            left = self._tried(left, len(tasks), look)
            lost = lost + 1 if len(left) == before else 0
            if lost > LOSSES:
                raise TrainingFailed(
                    f"{self.group}.engine=slurm: jobs were lost {lost} times in a row; see "
                    f"{self.logs}"
                )

    def _tried(self, shares: list[Share], total: int, look: Callable[[int], None]) -> list[Share]:
        """The shares of those jobs of an array that ended without a result, as when they are
        killed."""
        # URLs of data, which may hold a password, are in what jobs are given.
        self.logs.mkdir(parents=True, exist_ok=True)
        self.logs.chmod(0o700)
        with jobs.clean_environment(), jobs.slurm_refusals():
            executor = jobs.slurm_executor(self.options, self.logs, nodes=1, tasks=1, gpus=0)
            with executor.batch():
                going = {
                    number: (executor.submit(share), share) for number, share in enumerate(shares)
                }
        for pickled in self.logs.glob("*.pkl"):
            pickled.chmod(0o600)
        lost: list[Share] = []
        looked = 0.0
        try:
            while going:
                queue = time.monotonic() > looked + SECONDS_BETWEEN_LOOKS
                looked = time.monotonic() if queue else looked
                for number, (job, share) in list(going.items()):
                    if not jobs.ended(job, queue):
                        continue
                    if not jobs.has_result(job):
                        lost.append(share)
                    elif failure := jobs.failure_of(f"{self.group}, job {job.job_id}", job):
                        raise failure
                    del going[number]
                undone = [*(share for _, share in going.values()), *lost]
                look(total - sum(len(share.tasks) for share in undone))
                time.sleep(0.2)
        finally:  # what a killed job has finished stays
            for job, _ in going.values():
                subprocess.run(["scancel", "--quiet", job.job_id], capture_output=True, check=False)
        return lost
