"""Work that each process does by itself, while all see of each other that it goes on."""

import threading
from types import TracebackType
from typing import NamedTuple, Protocol

from doremi_train.parallel import comm
from doremi_train.parallel.comm import Lost

_PAUSE = (0.02, 5.0)  # first and longest time between rounds, seconds


class Stop(Protocol):
    """What a signal asks for."""

    requested: bool


class _State(NamedTuple):
    """What a process says in a round."""

    working: bool
    stopping: bool
    failed: bool


class Alongside:
    """A context in which no collective may be called: a thread of every process meets the others in
    rounds, until all have done their part.

    A process that is told to stop tells it to all. Raises Lost where another one failed, and what
    says so where one is gone; those that are still at work are told to stop then.
    """

    def __init__(self, stop: Stop) -> None:
        self._stop, self._done = stop, threading.Event()
        self._error: Exception | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._rounds, name="alongside", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._failed = kind is not None and not self._stop.requested
        self._done.set()
        self._thread.join()
        if self._error is not None:
            raise self._error from None

    def _rounds(self) -> None:
        pause, limit = _PAUSE
        limit = min(limit, comm.patience() / 4)
        try:
            while True:
                working = not self._done.wait(pause)
                pause = min(2 * pause, limit)
                said = comm.gather(_State(working, self._stop.requested, self._failed))
                if any(state.stopping for state in said):
                    self._stop.requested = True
                others = [rank for rank, state in enumerate(said) if state.failed]
                if others and not self._failed:
                    raise Lost(f"process {others[0]} failed; look at its own output")
                if others or not any(state.working for state in said):
                    return
        except Exception as error:  # raised by the main thread
            self._stop.requested = True
            self._error = error
