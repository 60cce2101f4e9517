"""Engines that run tasks: a pool of processes, or a Ray cluster; `stages.choice.array` has the
array of Slurm jobs. Tasks are idempotent, so a lost worker costs only the task it was at, and no
engine changes what is written."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from doremi_train.config import UserError
from doremi_train.console import say

T = TypeVar("T")
LOSSES = 5  # workers that may be lost in a row without any task being finished

Look = Callable[[int], None]  # at the number of finished tasks, often; what it raises ends the run


class Engine(Protocol):
    """What runs tasks."""

    def run(self, work: Callable[[T], Any], tasks: Sequence[T], look: Look) -> None:
        """Do `work` for every task. Raises the error of the first that failed, and UserError where
        workers are lost again and again."""


class Processes:
    """Workers on this machine, kept from one run to the next; with one of them the work is done
    right here."""

    def __init__(self, workers: int | None, group: str = "selection") -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self.group = group  # of the keys that messages name
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def run(self, work: Callable[[T], Any], tasks: Sequence[T], look: Look) -> None:
        if len(tasks) < 2 or not self._shared():
            for done, task in enumerate(tasks):
                look(done)
                work(task)
            return
        left, lost = dict(enumerate(tasks)), 0
        while left:
            pool = self._pool = self._pool or ProcessPoolExecutor(
                self.workers, get_context("spawn")
            )
            before = len(left)
            try:
                self._wait(
                    {pool.submit(work, task): number for number, task in left.items()},
                    left,
                    look,
                    len(tasks),
                )
            except BrokenProcessPool:  # a worker was killed: others go on
                self._close()
                lost = lost + 1 if len(left) == before else 1
                if lost > LOSSES:
                    raise UserError(
                        f"{self.group}.workers={self.workers}: workers were killed {lost} times "
                        "in a row, as when memory is short; take fewer, and the same command "
                        "continues"
                    ) from None

    def _shared(self) -> bool:
        """Whether the work is shared out: processes need a lock between them, and it may be that
        there can be none."""
        try:
            if self.workers > 1 and self._pool is None:
                get_context("spawn").Lock()
        except OSError as error:
            say(f"{self.group}.workers={self.workers}: only one can work here ({error}; /dev/shm?)")
            self.workers = 1
        return self.workers > 1

    @staticmethod
    def _wait(
        futures: dict[Future[Any], int], left: dict[int, Any], look: Look, total: int
    ) -> None:
        waiting = set(futures)
        while waiting:
            look(total - len(left))
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            failed = [future for future in done if future.exception() is not None]
            for future in done.difference(failed):
                del left[futures[future]]
            for future in failed:
                future.result()

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class Ray:
    """Tasks of Ray Core on the cluster that RAY_ADDRESS names or that was started on this machine;
    where there is none, on a Ray of this command's own. Every node reads the data and writes the
    store under the same paths."""

    def __init__(self, workers: int | None, group: str = "selection") -> None:
        self.workers = workers
        self.group = group  # of the keys that messages name

    def __enter__(self) -> "Ray":
        try:
            import ray
        except ImportError:
            raise UserError(
                f"{self.group}.engine=ray: needs ray; pip install 'doremi-train[ray]'"
            ) from None
        try:
            ray.init(
                log_to_driver=False,
                logging_level=logging.WARNING,
                include_dashboard=False,
                configure_logging=False,
            )
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise UserError(
                f"{self.group}.engine=ray: no cluster at RAY_ADDRESS="
                f"{os.environ.get('RAY_ADDRESS')} ({error}); start one with ray start --head"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()  # its own tasks end with it, a cluster stays

    @property
    def nodes(self) -> int:
        """Nodes of the cluster that are alive."""
        import ray

        return sum(node["Alive"] for node in ray.nodes())

    def run(self, work: Callable[[T], Any], tasks: Sequence[T], look: Look) -> None:
        import ray

        # Retried where a worker or a node is lost.
        remote = ray.remote(num_cpus=1, max_retries=LOSSES)(work)
        waiting, done = list(tasks)[::-1], 0
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < (self.workers or len(tasks)):
                running.append(remote.remote(waiting.pop()))
            ready, running = ray.wait(running, timeout=0.5)
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise UserError(
                    f"{self.group}.engine=ray: a task was lost {LOSSES + 1} times, as when memory "
                    f"is short ({error}); the same command continues"
                ) from None
            done += len(ready)
            look(done)
