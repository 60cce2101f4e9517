"""How good a classifier is: accuracy, macro-F1, calibration, and the temperature that mends it."""

import math
from typing import NamedTuple

import scipy
import torch
from torch import Tensor


class Judged(NamedTuple):
    """What a checker says of every example."""

    loss: Tensor  # (N,) float64 nats of its label
    agrees: Tensor  # (N,) whether its label is the likeliest
    temperature: float


def judge(logs: Tensor, label: Tensor, temperature: float) -> Judged:
    """Judge by log-probabilities (N, C), divided by the temperature."""
    scaled = (logs / temperature).log_softmax(1)
    return Judged(-label_probabilities(scaled, label), scaled.argmax(1) == label, temperature)


def temperature(logs: Tensor, label: Tensor) -> float:
    """Temperature of the lowest loss on examples the model was not trained on; 1/20 to 20."""

    def loss(logarithm: float) -> float:
        return float(judge(logs, label, math.exp(logarithm)).loss.mean())

    return math.exp(
        scipy.optimize.minimize_scalar(
            loss, bounds=(-math.log(20), math.log(20)), method="bounded"
        ).x
    )


def label_probabilities(logs: Tensor, label: Tensor) -> Tensor:
    """Log-probability (N,) of each example's own label."""
    return logs.gather(1, label[:, None])[:, 0]


def accuracy(logs: Tensor, label: Tensor) -> float:
    return float((logs.argmax(1) == label).double().mean())


def macro_f1(logs: Tensor, label: Tensor) -> float:
    """The unweighted mean of F1 over classes that are there, or predicted."""
    classes, predicted = logs.shape[1], logs.argmax(1)
    hit = torch.bincount(label[predicted == label], minlength=classes).double()
    both = torch.bincount(label, minlength=classes) + torch.bincount(predicted, minlength=classes)
    return float((2 * hit / both.clamp_min(1))[both > 0].mean())


def calibration_error(logs: Tensor, label: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy − confidence| over bins of equal width, weighted by
    their size."""
    confidence, predicted = logs.exp().max(1)
    place = (confidence * bins).long().clamp_max(bins - 1)
    gap = (predicted == label).double() - confidence
    return float(
        torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gap).abs().sum() / len(label)
    )


def figures(logs: Tensor, label: Tensor) -> dict[str, float]:
    """Figures of test log-probabilities (N, C) against the labels (N,)."""
    return {
        "accuracy": accuracy(logs, label),
        "macro_f1": macro_f1(logs, label),
        "calibration_error": calibration_error(logs, label),
        "loss": -float(label_probabilities(logs, label).mean()),
    }
