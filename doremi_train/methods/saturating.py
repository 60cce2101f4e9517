"""A law of mixtures that saturates: passes over a domain help ever less, too many harm, and a loss
has a floor (the form of marin's lab book of 2026, `weibull_softplus_unscaled@kappa_floor_link`,
written from its formula).

E_b = w_b D / n_b is how often a run of D tokens passes over the n_b of domain b. Of each loss

    L(w) = φ + exp(c − Σ_b a_b (1 − exp(−(r E_b)^p)) + Σ_b h_b softplus(log(1 + E_b) − τ)²)

with a, h ≥ 0. Where D / n is unknown, w stands in for E. For φ, r, p and τ on a grid, log(L − φ) is
linear in c, a, h: non-negative least squares, with rows weighted by L − φ and a ridge on columns of
unit spread. Inner folds choose, first without h, then with. The grid of r is in units of the middle
domain's passes, so that sizes move it along.

K domains, N runs, M losses in nats per token, R mixtures; J columns of a linear problem, G settings
of a grid, F folds.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train.methods import nnls
from doremi_train.methods.box import Floats
from doremi_train.methods.fits import UNKNOWN, Known, at, replicates

RATES = (0.3, 1.0, 4.0, 16.0)  # r
POWERS = (0.35, 0.6, 1.0)  # p
DEPTHS = (0.02, 0.05, 0.1, 0.2, 0.4, 1.0, 3.0, 1000.0)  # κ − 1; the last is as good as no floor
MIDDLE = (1.0, 0.6)  # r and p that the search begins with
RIDGES = (1e-4, 1e-2)
KNEES = (0.0, 1.5, 3.0)  # τ: harm sets in after 0, 3.5 and 19 passes
FOLDS = 5
CHUNK = 4096  # mixtures that are predicted at once
NUMBERS = 4_000_000  # of the Gram matrices that are solved at once

Folds = NDArray[np.int_]  # (N,) the fold of each run
Map = tuple[float, float, float]  # r, p and τ, which is infinite without harm


class Saturating(NamedTuple):
    """The law of M losses. A domain of no passes has slope 0 here, though the law's is infinite for
    p < 1."""

    passes: Tensor  # (K,) D / n
    floor: Tensor  # (M,) φ
    constant: Tensor  # (M,) c
    rate: Tensor  # (M,) r
    power: Tensor  # (M,) p
    knee: Tensor  # (M,) τ
    help: Tensor  # (M, K) a
    harm: Tensor  # (M, K) h

    def losses(self, points: Tensor) -> Tensor:
        """(R, K) → (R, M) in float64, with a gradient."""
        exposure = (points * self.passes)[..., None, :]
        helped, harmed = columns(
            exposure, self.rate[:, None], self.power[:, None], self.knee[:, None]
        )
        log = self.constant + (self.help * helped).sum(-1) + (self.harm * harmed).sum(-1)
        return self.floor + log.clamp_max(50).exp()

    def predict(self, points: Floats) -> Floats:
        with torch.no_grad():
            parts = torch.from_numpy(points).split(CHUNK)
            return torch.cat([self.losses(part) for part in parts]).numpy()


def columns(exposure: Tensor, rate: Tensor, power: Tensor, knee: Tensor) -> tuple[Tensor, Tensor]:
    """What a and h multiply, of E of any shape: −(1 − exp(−(r E)^p)) and softplus(log(1 + E) −
    τ)²."""
    helped = torch.expm1(-((rate * exposure).clamp_min(1e-30) ** power))
    return helped, torch.nn.functional.softplus(exposure.log1p() - knee) ** 2


# ── The fit ─────────────────────────────────────────────────────────────────────────


class Logs(NamedTuple):
    """log(L − φ), its weights, and the scale of L: G rows, each a loss at a depth of its floor."""

    floor: Floats  # (G,) φ
    gap: Floats  # (G, N) L − φ
    scale: Floats  # (G,) variance of L


class Place(NamedTuple):
    """A place on the grid."""

    map: Map
    row: int  # of Logs
    ridge: float


class Law(NamedTuple):
    """One loss at a place on the grid."""

    place: Place
    error: float  # mean square out of fold, in parts of the loss's variance
    constant: float  # c
    slope: Floats  # (2 K,) a and h


def saturating(points: Floats, losses: Floats, known: Known = UNKNOWN) -> Saturating:
    """Fit of the law: (N, K), (N, M) → parameters of each loss. One part of the grid after another
    is searched, and the others held."""
    passes = np.ones(points.shape[1]) if known.passes is None else known.passes
    logs, count = _logs(points, losses, known), losses.shape[1]
    unit = float(np.median(passes))
    fold = np.random.default_rng(0).permutation(len(points)) % min(FOLDS, len(points))

    def best(options: list[list[Place]]) -> list[Law]:
        return _search(points * passes, logs, fold, options)

    def floors(maps: list[Map]) -> list[list[Place]]:
        return [
            [Place(one, depth * count + loss, ridge) for loss, one in enumerate(maps)]
            for depth, ridge in product(range(len(DEPTHS)), RIDGES)
        ]

    laws = best(floors([(MIDDLE[0] / unit, MIDDLE[1], np.inf)] * count))
    pairs = [(rate / unit, power, np.inf) for rate, power in product(RATES, POWERS)]
    laws = best([[law.place._replace(map=pair) for law in laws] for pair in pairs])
    laws = best(floors([law.place.map for law in laws]))
    knees = (np.inf, *KNEES)
    laws = best(
        [[law.place._replace(map=(*law.place.map[:2], knee)) for law in laws] for knee in knees]
    )
    parts = (
        passes,
        logs.floor[[law.place.row for law in laws]],
        np.array([law.constant for law in laws]),
        *np.array([law.place.map for law in laws]).T,
        *np.stack([np.split(law.slope, 2) for law in laws], axis=1),
    )
    return Saturating(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


def _logs(points: Floats, losses: Floats, known: Known) -> Logs:
    """Floors below the best run by κ − 1 times what it is better than natural, or than the median
    where natural was not run. That is φ = L(natural) − κ (L(natural) − min L); but of runs of which
    natural is nearly the best, a tenth of the median's lead counts, and never less than 3 σ."""
    low, middle = losses.min(0), np.median(losses, axis=0)
    near = np.zeros(len(points), bool) if known.natural is None else at(points, known.natural)
    usual = losses[near].mean(0) if near.any() else middle
    rise = np.maximum(usual - low, 0.1 * (middle - low))
    rise = np.maximum(rise, 3 * replicates(points, losses)) + 1e-9 * np.abs(low) + 1e-300
    floor = (low - np.array(DEPTHS)[:, None] * rise).ravel()
    scale = np.tile(losses.var(0) + 1e-300, len(DEPTHS))
    return Logs(floor, np.tile(losses.T, (len(DEPTHS), 1)) - floor[:, None], scale)


def _search(exposure: Floats, logs: Logs, fold: Folds, options: list[list[Place]]) -> list[Law]:
    """Best of options for each of M losses; each is (M,) places. Half of the say is all losses'
    together, for they are alike, and folds of few runs are a noisy judge."""
    alike: dict[Map, list[Place]] = {}
    for place in dict.fromkeys(place for option in options for place in option):
        alike.setdefault(place.map, []).append(place)
    one = (fold.max() + 2) * (2 * exposure.shape[1]) ** 2
    most = max(NUMBERS // int(one), 1)
    laws = {
        law.place: law
        for places in alike.values()
        for first in range(0, len(places), most)
        for law in _solve(exposure, logs, fold, places[first : first + most])
    }
    tried = [[laws[place] for place in option] for option in options]
    score = np.log([[law.error + 1e-12 for law in option] for option in tried])
    chosen = (score + score.mean(1, keepdims=True)).argmin(0)
    return [tried[index][loss] for loss, index in enumerate(chosen)]


def _columns(exposure: Floats, rate: float, power: float, knee: float) -> Floats:
    """(N, 2 K), or (N, K) without harm."""
    given = (torch.tensor(value, dtype=torch.float64) for value in (rate, power, knee))
    helped, harmed = columns(torch.from_numpy(exposure), *given)
    return (torch.cat([helped, harmed], dim=1) if knee < np.inf else helped).numpy()


def _solve(exposure: Floats, logs: Logs, fold: Folds, places: list[Place]) -> list[Law]:
    """Least squares at places of one map, on all runs and on all but a fold, which it then
    predicts."""
    rows, given = [place.row for place in places], _columns(exposure, *places[0].map)
    middle, spread = given.mean(0), given.std(0)
    spread[spread < 1e-9] = np.inf  # a column that never changes says nothing
    unit, gap = (given - middle) / spread, logs.gap[rows]
    log, weight = np.log(gap), gap / gap.mean(1, keepdims=True)
    inside = [fold == one for one in range(fold.max() + 1)]
    parts = [_sums(unit[held], weight[:, held], log[:, held]) for held in inside]
    total, level, mean, target, gram = (
        np.stack([sum(each), *(sum(each) - part for part in each)])  # the first is of all runs
        for each in zip(*parts, strict=True)
    )
    total = np.maximum(total, 1e-300)  # of one run alone nothing is left
    level, mean = level / total, mean / total[..., None]
    target = target / total[..., None] - mean * level[..., None]
    gram = gram / total[..., None, None] - mean[..., :, None] * mean[..., None, :]
    gram += np.array([place.ridge for place in places])[:, None, None] * np.eye(len(middle))

    # What is free on all runs is a good guess for most of them.
    _, free = nnls.solve(gram[0], target[0], target[0] > 0)
    flat = gram.reshape(-1, *gram.shape[2:]), target.reshape(-1, len(middle))
    slope = nnls.solve(*flat, np.tile(free, (len(gram), 1)))[0].reshape(target.shape)
    constant = level - (mean * slope).sum(-1)
    square = np.zeros(len(rows))
    for one, held in enumerate(inside, 1):
        logged = constant[one][:, None] + slope[one] @ unit[held].T
        square += ((np.exp(np.minimum(logged, 50)) - gap[:, held]) ** 2).sum(1)
    found = slope[0] / spread
    whole = np.pad(found, ((0, 0), (0, 2 * exposure.shape[1] - len(middle))))
    error = square / len(given) / logs.scale[rows]
    return list(map(Law, places, error, constant[0] - found @ middle, whole))


def _sums(unit: Floats, weight: Floats, log: Floats) -> tuple[Floats, ...]:
    """Weighted sums over runs: of 1 (G,), of the log (G,), of the columns (G, J), of their products
    with the log (G, J) and with each other (G, J, J)."""
    row, column = np.triu_indices(unit.shape[1])
    gram = np.empty((len(weight), unit.shape[1], unit.shape[1]))
    gram[:, row, column] = gram[:, column, row] = weight @ (unit[:, row] * unit[:, column])
    logged = weight * log
    return weight.sum(1), logged.sum(1), weight @ unit, logged @ unit, gram
