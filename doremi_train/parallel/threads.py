"""Threads of BLAS and torch within a process."""

from contextlib import ContextDecorator

from threadpoolctl import threadpool_limits


def one_thread() -> ContextDecorator:
    """Fits solve thousands of small systems: threads would wait for each other at each of them, and
    for long where other work has the cores."""
    limit: ContextDecorator = threadpool_limits.wrap(1)
    return limit
