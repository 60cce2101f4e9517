"""Meeting of the processes of a launch, which keeps a time limit and hears signals.

torch's own waits in C++, where no signal is heard, and without end for a port that takes the
connection and never answers. Where they meet, each says what it is about to do, and where it ends
by a mistake, with which words.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from doremi_train.parallel.agreement import Differ, differences
from doremi_train.storage import waiting

# What a launcher says to each process.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NAMED = 10  # ranks that a message names
_LINGER = 3.0  # seconds that processes which end give each other to read


class Unmet(Exception):
    """The processes did not meet. Exit code 1: the same command, started again, goes on."""

    exit_code = 1
    alone = True  # each says what it saw


class Meeting:
    """Way of one process to the others, as far as it got."""

    def __init__(self) -> None:
        rank, size, _, self.address, port = (os.environ[name] for name in LAUNCHED)
        self.rank, self.size, self.port = int(rank), int(size), int(port)
        self._missing = list(range(self.size))  # as the first process sees it
        self._connected = False
        self._said: Mapping[str, str] = {}
        self._store: Any = None

    def hold(
        self,
        connect: Callable[["Meeting"], Any],
        said: Mapping[str, str],
        timeout: float,
        check: Callable[[], None] = lambda: None,
    ) -> Any:
        """The store (torch's, of keys and values) that `connect` opens, when all processes have
        opened it and `said` the same.

        Raises Differ where they said other things, Unmet where they have not come after `timeout`
        seconds, and meanwhile whatever `check` raises.
        """
        self._said = said
        try:
            return waiting.within(timeout, lambda: self._go(connect), check, foreign=True)
        except (RuntimeError, waiting.Waited) as error:  # torch's are RuntimeErrors
            raise self._unmet(error, timeout) from None

    def _go(self, connect: Callable[["Meeting"], Any]) -> Any:
        self._store = store = connect(self)
        self._connected = True
        store.set(str(self.rank), json.dumps(self._said))
        if self.rank == 0:
            while self._missing:
                self._missing = [rank for rank in self._missing if not store.check([str(rank)])]
                time.sleep(0.05)
            every = [json.loads(store.get(str(rank))) for rank in range(self.size)]
            store.set("all", differences(every) or "agreed")
        while not store.check(["all"]):
            time.sleep(0.1)
        verdict = store.get("all").decode()
        self._read_by_all("heard")
        if verdict != "agreed":
            raise Differ(verdict)
        return store

    def part(self, words: str) -> bool:
        """End with these words; returns whether the first process does too, which then speaks for
        both."""
        if self._store is None:
            return False
        try:
            return waiting.within(2 * _LINGER, lambda: self._part(words), foreign=True)
        except (RuntimeError, waiting.Waited):  # it is gone, and its store with it
            return False

    def _part(self, words: str) -> bool:
        limit = time.monotonic() + _LINGER
        if self.rank == 0:
            self._store.set("last words", words)
        while not self._store.check(["last words"]):
            if time.monotonic() > limit:
                return False
            time.sleep(0.02)
        same: bool = self._store.get("last words").decode() == words
        self._read_by_all("read")
        return same

    def _read_by_all(self, what: str) -> None:
        """Count this process; the first, which may be the server, gives the others time to read."""
        read, limit = self._store.add(what, 1), time.monotonic() + _LINGER
        while self.rank == 0 and read < self.size and time.monotonic() < limit:
            time.sleep(0.02)
            read = self._store.add(what, 0)

    def _unmet(self, error: Exception, timeout: float) -> Unmet:
        if not self._connected and self.rank == 0:
            what = "this process, the first, cannot listen there"
        elif not self._connected:
            what = "nobody answers there as the first process does"
        elif self.rank == 0:
            named = ", ".join(map(str, self._missing[:_NAMED])) + ", …" * (
                len(self._missing) > _NAMED
            )
            what = f"of {self.size} processes did not come: RANK={named}"
        else:
            what = "the first process was there and others were not; its own message names them"
        if not isinstance(error, waiting.Waited):
            what += f" ({str(error).splitlines()[0][:200]})"
        return Unmet(
            f"the processes did not meet at MASTER_ADDR:MASTER_PORT={self.address}:{self.port} "
            f"within training.timeout={timeout:g} s: {what}; start all of them with the same two, "
            "and where something else listens there, take another port (torchrun --master-port). "
            "The same command continues from the last checkpoint"
        )
