"""Calls that may wait without end, waited for in a thread of their own: for so long, and with
signals heard."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_LOOK = 0.1  # seconds between looks at the clock and at what a signal said
_left: list[threading.Thread] = []


class Waited(TimeoutError):
    """The call did not return in time. Its thread is left behind, and ends with the process."""


def within(
    seconds: float,
    call: Callable[[], T],
    check: Callable[[], None] = lambda: None,
    foreign: bool = False,
) -> T:
    """`call()`, or what it raises. Raises Waited after `seconds`, and meanwhile whatever `check`
    raises.

    A library that waits in C hears no signal in the main thread; here it waits in another one.
    `foreign`: it may not wake up in an interpreter that ends (see `left`).
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised by who waits
            errors.append(error)
        finally:
            done.set()

    # No pool: Python waits for a pool's threads at its end.
    thread = threading.Thread(target=run, name="waiting", daemon=True)
    thread.start()
    limit = time.monotonic() + seconds
    try:
        while not done.wait(min(_LOOK, max(limit - time.monotonic(), 0))):
            check()
            if time.monotonic() >= limit:
                raise Waited(f"no answer for {seconds:g} s")
    except BaseException:
        if foreign:
            _left.append(thread)
        raise
    if errors:
        raise errors[0]
    return results[0]


def left() -> bool:
    """Whether a foreign call still waits: then the process must end at once (`os._exit`), because a
    thread of C++ that comes back while the interpreter ends aborts it."""
    return any(thread.is_alive() for thread in _left)
