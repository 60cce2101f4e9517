"""Work of small matrices within a process."""

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from threadpoolctl import threadpool_limits

from doremi_train.storage import waiting
from doremi_train.storage.runs import stop

P = ParamSpec("P")
T = TypeVar("T")


def fitting(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that fits, which has one thread and hears signals: fits solve thousands of small
    systems, at each of which threads of BLAS or torch would wait for each other, and for minutes
    none of them looks whether the process was told to stop. It raises Preempted then."""

    def decorated(call: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(call)
        def run(*given: P.args, **named: P.kwargs) -> T:
            def alone() -> T:
                torch.get_num_threads()  # which sets the number of a new thread when first asked
                with threadpool_limits(1):
                    return call(*given, **named)

            return waiting.within(math.inf, alone, lambda: stop.check(what))

        return run

    return decorated
