"""One thread for what is small."""

import pytest
import threadpoolctl
import torch

from doremi_train.parallel.threads import one_thread


def limits() -> set[int]:
    """Of numpy's and scipy's BLAS, and of OpenMP."""
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}


def test_a_fit_has_one_thread_and_gives_the_others_back() -> None:
    @one_thread()
    def fit() -> None:
        assert torch.get_num_threads() == 1 and limits() == {1}
        raise ValueError("singular")

    with threadpoolctl.threadpool_limits(2):
        for _ in range(2):
            with pytest.raises(ValueError, match="singular"):
                fit()
            assert torch.get_num_threads() == 2 and limits() == {2}
