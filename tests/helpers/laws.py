"""Known laws, as the saturating fit should find them."""

import numpy as np
import torch

from doremi_train.methods.box import Floats
from doremi_train.methods.saturating import Saturating


def truth(points: Floats, passes: Floats, knee: float, seed: int = 0) -> Saturating:
    """A law of three losses on the grid of the fit: r = 1 in the unit of the fit, p = 0.6, κ =
    1.2 of these runs."""
    random, domains = np.random.default_rng(seed), points.shape[1]
    helped = random.uniform(0, 1, (3, domains)) + np.eye(3, domains) * 2
    harmed = random.uniform(0.05, 0.3, (3, domains)) * (knee < np.inf)
    given = torch.full((3,), 1 / np.median(passes)), torch.full((3,), 0.6), torch.full((3,), knee)
    tensors = [torch.as_tensor(part, dtype=torch.float64) for part in (*given, helped, harmed)]
    found = Saturating(torch.from_numpy(passes), *torch.zeros(2, 3).double(), *tensors)
    # With φ = min − (κ − 1) (median − min) of the runs, the exponent has a range of its own.
    exponent = np.log(found.predict(points))
    scale = np.log(1.2 / 0.2) / (np.median(exponent, axis=0) - exponent.min(0))
    scale = torch.from_numpy(scale)
    return found._replace(
        floor=torch.tensor([1.5, 2.0, 2.5], dtype=torch.float64),
        help=found.help * scale[:, None],
        harm=found.harm * scale[:, None],
    )
