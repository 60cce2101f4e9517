"""Fits have one thread, and hear signals."""

import time

import pytest
import threadpoolctl
import torch

from doremi_train.parallel.threads import fitting
from doremi_train.storage.runs import Preempted, stop


def threads() -> set[int]:
    """Of numpy's and scipy's BLAS, of OpenMP, and of torch."""
    pools = threadpoolctl.threadpool_info()
    return {torch.get_num_threads(), *(pool["num_threads"] for pool in pools)}


def test_a_fit_has_one_thread_and_gives_the_others_back() -> None:
    @fitting("fit")
    def fit(runs: int) -> int:
        assert threads() == {1}
        if not runs:
            raise ValueError("no runs")
        return runs + 1

    before = threads()
    assert fit(3) == 4
    with pytest.raises(ValueError, match="no runs"):
        fit(runs=0)
    assert threads() == before


def test_a_fit_that_is_told_to_stop_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fitting("swarm")(lambda: time.sleep(60))
    monkeypatch.setattr(stop, "requested", True)
    before = time.monotonic()
    with pytest.raises(Preempted, match="swarm: told to stop; the same command continues it"):
        fit()
    assert time.monotonic() - before < 30
