"""Losses by token and by domain, as another trainer's loop has them.

K domains, B sequences of a micro-batch, T tokens a sequence, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from doremi_train.methods.online import Stats

IGNORED = -100  # label of a token without a loss


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) losses in nats, 0 where it is ignored, and where it is not, of logits (B, T, V) and
    the labels (B, T) they are to foretell."""
    labels = labels.to(logits.device)
    flat = cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(labels), labels != IGNORED


def sums(losses: Tensor, present: Tensor, domain: Tensor, domains: int) -> Stats:
    """(K,) losses, and tokens that have one, of (B, T) and `domain` (B,)."""
    zeros = losses.new_zeros(domains, dtype=torch.float64)
    return Stats(*(zeros.index_add(0, domain, x.double().sum(1)) for x in (losses, present)))
