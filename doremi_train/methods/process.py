"""Gaussian process over mixtures: a squared exponential of the Hellinger distance, with noise.

Length and noise are those of greatest likelihood on a grid. With one eigendecomposition a length,
every noise and every loss costs but sums.

K domains, N runs, M losses, R mixtures.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from doremi_train.methods.box import Floats
from doremi_train.methods.fits import UNKNOWN, Known

LENGTHS = np.geomspace(0.05, 20, 19)
NOISES = np.geomspace(1e-7, 10, 17)  # variances, in parts of the process's own
CHUNK = 4096  # mixtures that are predicted at once


class Process(NamedTuple):
    """Posterior mean of M losses. Weights of 0 have slope 0 here, though that of their roots is
    infinite."""

    roots: Tensor  # (N, K) √w of the runs
    mean: Tensor  # (M,)
    length: Tensor  # (M,)
    weight: Tensor  # (N, M)

    def losses(self, points: Tensor) -> Tensor:
        """(R, K) → (R, M) in float64, with a gradient."""
        roots = points.clamp_min(1e-12).sqrt()
        squares = (roots**2).sum(-1, keepdim=True) - 2 * roots @ self.roots.T
        squares = (squares + (self.roots**2).sum(-1)).clamp_min(0)
        found = torch.empty(*points.shape[:-1], len(self.mean), dtype=torch.float64)
        for length in self.length.unique():
            alike = self.length == length
            found[..., alike] = torch.exp(-squares / (2 * length**2)) @ self.weight[:, alike]
        return self.mean + found

    def predict(self, points: Floats) -> Floats:
        with torch.no_grad():
            parts = torch.from_numpy(points).split(CHUNK)
            return torch.cat([self.losses(part) for part in parts]).numpy()


def gaussian_process(points: Floats, losses: Floats, known: Known = UNKNOWN) -> Process:
    """Length and noise of each loss by maximum likelihood: (N, K), (N, M)."""
    roots, mean = np.sqrt(np.maximum(points, 1e-12)), losses.mean(0)
    squares = ((roots[:, None] - roots) ** 2).sum(-1)
    left, runs = losses - mean, len(points)
    best, length, weight = np.full(len(mean), np.inf), np.ones(len(mean)), np.zeros_like(losses)
    for tried in LENGTHS:
        values, vectors = np.linalg.eigh(np.exp(-squares / (2 * tried**2)))
        turned = vectors.T @ left  # (N, M)
        variances = np.maximum(values, 0) + NOISES[:, None]  # (noises, N)
        # −2 log likelihood, at the variance that suits it best.
        scale = (1 / variances) @ turned**2 / runs  # (noises, M)
        cost = runs * np.log(np.maximum(scale, 1e-300)) + np.log(variances).sum(1)[:, None]
        lowest = cost.min(0)
        better = lowest < best
        noise = variances[cost.argmin(0)].T  # (N, M)
        best, length = np.where(better, lowest, best), np.where(better, tried, length)
        weight = np.where(better, vectors @ (turned / noise), weight)
    return Process(*(torch.from_numpy(part) for part in (roots, mean, length, weight)))
