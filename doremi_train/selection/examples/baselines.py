"""Baselines over prompts with answers: by their words, and by what a model makes of them.

N examples of the pool, V of a target, d hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train.selection.documents.registry import METHODS
from doremi_train.selection.documents.scorers import whole
from doremi_train.selection.examples.influence import Coded, batches
from doremi_train.selection.options import SelectionOptions

_TOGETHER = 1000  # texts that are split into words together
_TEMPERATURE = 0.1  # of n-gram resampling, in standard deviations of the score


def text(record: Mapping[str, Any]) -> bytes:
    """All that is said in a record."""
    said = (
        [message["content"] for message in record["messages"]]
        if "messages" in record
        else [record["prompt"], record["completion"]]
    )
    return "\n".join(said).encode()


def by_words(
    method: str, pool: Sequence[bytes], targets: Mapping[str, list[bytes]]
) -> NDArray[np.float64]:
    """(N, targets) scores of a method of document selection, each text uncut."""
    scorer = METHODS[method](SelectionOptions(method=method))
    batched = [
        whole(list(pool[first : first + _TOGETHER])) for first in range(0, len(pool), _TOGETHER)
    ]
    sums = scorer.sums()
    for batch in batched:
        scorer.observe(batch, sums)
    fitted = scorer.fit(targets, sums)
    return np.concatenate([scorer.score(batch, fitted) for batch in batched])


def resampled(scores: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """(N,) keys whose largest are a draw without replacement, likelier for high scores: these and
    Gumbel noise."""
    noise = np.random.Generator(np.random.Philox(key=[seed, 0])).gumbel(size=len(scores))
    return scores + _TEMPERATURE * max(float(scores.std()), 1e-12) * noise


@torch.no_grad()
def representations(
    inner: Any, examples: Sequence[Coded], tokens: int, device: torch.device
) -> dict[str, Tensor]:
    """Unit vectors (N, d) of examples by a transformers model: `rds`, its last layer at the last
    token; `rds_plus`, the mean over all tokens, later ones weighing more (Ivison et al. 2025,
    https://arxiv.org/abs/2503.01807)."""
    vectors = {
        name: torch.zeros(len(examples), inner.config.hidden_size) for name in ("rds", "rds_plus")
    }
    inner = inner.to(device).eval()
    for numbers, batch in batches(examples, tokens, device):
        length = torch.tensor([len(examples[n]) for n in numbers], device=device)
        hidden = inner.base_model(
            input_ids=torch.where(batch < 0, ~batch, batch)
        ).last_hidden_state.float()
        position = torch.arange(1, batch.shape[1] + 1, device=device).expand_as(batch)
        weights = position * (position <= length[:, None])
        vectors["rds"][numbers] = hidden[
            torch.arange(len(numbers), device=device), length - 1
        ].cpu()
        vectors["rds_plus"][numbers] = (
            (weights[..., None] * hidden).sum(1) / weights.sum(1, keepdim=True)
        ).cpu()
    return {name: torch.nn.functional.normalize(rows, dim=1) for name, rows in vectors.items()}


def round_robin(cosines: NDArray[np.floating], count: int) -> list[int]:
    """Examples, `count` or all, by cosines (N, V): each of the target's examples in turn takes the
    one most like it that is not taken yet."""
    orders = [iter(np.argsort(-column, kind="stable").tolist()) for column in cosines.T]
    taken: dict[int, None] = {}
    while len(taken) < min(count, len(cosines)):
        for order in orders:
            pick = next((n for n in order if n not in taken), None)
            if pick is not None and len(taken) < count:
                taken[pick] = None
    return list(taken)
