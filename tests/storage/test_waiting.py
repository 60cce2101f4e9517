"""A call that waits is waited for so long and no longer, and what a signal says is heard."""

import threading
from collections.abc import Iterator

import pytest

from doremi_train.storage import waiting


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What a call waits for in vain, until the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_what_a_call_gives_and_raises_is_handed_on() -> None:
    assert waiting.within(60, lambda: threading.current_thread().name) == "waiting"
    with pytest.raises(KeyError, match="missing"):
        waiting.within(60, lambda: {}["missing"])


def test_a_call_that_does_not_return_is_left(never: threading.Event) -> None:
    with pytest.raises(waiting.Waited, match=r"no answer for 0\.2 s"):
        waiting.within(0.2, never.wait)
    assert not never.is_set() and not waiting.left()


def test_a_check_is_heard_while_a_call_waits(never: threading.Event) -> None:
    asked = []

    def check() -> None:
        asked.append(True)
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        waiting.within(3600, never.wait, check)


def test_foreign_calls_that_still_wait_are_known() -> None:
    event = threading.Event()
    with pytest.raises(waiting.Waited):
        waiting.within(0.1, event.wait, foreign=True)
    assert waiting.left()
    event.set()
    for thread in threading.enumerate():
        if thread.name == "waiting":
            thread.join(60)
    assert not waiting.left()
