"""Where tasks run: in a pool of processes. Tasks are idempotent, so a lost worker costs only the task it was at."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from doremi_train.config import UserError

T = TypeVar("T")
LOSSES = 5  # workers that may be lost in a row without any task being finished

Look = Callable[[int], None]  # at the number of finished tasks, often; what it raises ends the run


class Processes:
    """Workers on this machine, kept from one run to the next; with one of them the work is done right here."""

    def __init__(self, workers: int | None) -> None:
        self.workers = workers or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def run(self, work: Callable[[T], Any], tasks: Sequence[T], look: Look) -> None:
        """Do `work` for every task. Raises the error of the first that failed, and UserError where workers are lost
        again and again."""
        if self.workers < 2 or len(tasks) < 2:
            for done, task in enumerate(tasks):
                look(done)
                work(task)
            return
        left, lost = dict(enumerate(tasks)), 0
        while left:
            pool = self._pool = self._pool or ProcessPoolExecutor(self.workers, get_context("spawn"))
            before = len(left)
            try:
                self._wait({pool.submit(work, task): number for number, task in left.items()}, left, look, len(tasks))
            except BrokenProcessPool:  # a worker was killed: others go on
                self._close()
                lost = lost + 1 if len(left) == before else 1
                if lost > LOSSES:
                    raise UserError(
                        f"selection.workers={self.workers}: workers were killed {lost} times in a row, as when memory "
                        "is short; take fewer, and the same command continues"
                    ) from None

    @staticmethod
    def _wait(futures: dict[Future[Any], int], left: dict[int, Any], look: Look, total: int) -> None:
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
