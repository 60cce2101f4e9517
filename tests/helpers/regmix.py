"""RegMix's public runs (sail-sg/regmix, MIT), where they lie beside the project, and figures of how
predictions rank them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import spearmanr

from doremi_train.methods.box import Floats
from doremi_train.methods.fits import Regressor

FOLDER = Path(__file__).parents[3] / "shared" / "regmix"
needed = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"RegMix's runs are not in {FOLDER}")


class Runs(NamedTuple):
    """Mixtures (N, 17) and losses (N, 13) in nats per token."""

    points: Floats
    losses: Floats

    def draw(self, count: int, seed: int) -> "Runs":
        """Some of the runs."""
        rows = np.random.default_rng(seed).permutation(len(self.points))[:count]
        return Runs(self.points[rows], self.losses[rows])


def runs(split: str, size: str) -> Runs:
    """The `train` runs (512 of 1m) or the `test` runs (256 of 1m and of 60m)."""
    points = _table(f"{split}_mixture_{size}.csv")
    return Runs(points / points.sum(1, keepdims=True), _table(f"{split}_pile_loss_{size}.csv"))


def _table(name: str) -> Floats:
    rows = np.loadtxt(FOLDER / name, delimiter=",", skiprows=1)
    return rows[rows[:, 0].argsort(), 1:]


class Ranked(NamedTuple):
    """How predictions rank unseen runs by their mean loss."""

    spearman: float
    best_third: float  # the same among the third with the lowest losses
    rmse: float  # of the mean, nats per token
    single: float  # mean over the losses of the Spearman correlation of each


def ranked(predicted: Floats, realised: Floats) -> Ranked:
    """Predicted and realised losses (R, M)."""
    mean, true = predicted.mean(1), realised.mean(1)
    best = np.argsort(true)[: len(true) // 3]
    each = zip(predicted.T, realised.T, strict=True)
    return Ranked(
        spearmanr(mean, true).statistic,
        spearmanr(mean[best], true[best]).statistic,
        float(np.sqrt(((mean - true) ** 2).mean())),
        float(np.mean([spearmanr(*both).statistic for both in each])),
    )


def on_unseen(fit: Regressor, count: int, seed: int) -> dict[str, Ranked]:
    """How a fit to some of the 512 ranks the 256 unseen mixtures, by the size of the models."""
    fitted = fit(*runs("train", "1m").draw(count, seed))
    unseen = {size: runs("test", size) for size in ("1m", "60m")}
    return {size: ranked(fitted.predict(one.points), one.losses) for size, one in unseen.items()}
