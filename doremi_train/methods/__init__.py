"""Every paper's numeric core: pure functions on tensors, one file a paper. No processes, no Hydra,
no files.

An *objective* is a module with the functions of `Objective`. The law: `observe` returns sums, the
caller adds them up over micro-batches and ranks, `update` and `weigh` read them back. So the same
step is right on one CPU and many GPUs:

    state = doremi.init(domains, steps, options)
    for batch in batches:
        losses = model(batch.tokens)                                               # (B, T)
        stats = doremi.observe(losses, reference_losses, batch.domain, domains, options)
        stats = Stats(*(all_reduce(s) for s in stats))                             # 2K floats
        state = doremi.update(state, stats, options)
        (doremi.weigh(state, batch.domain, stats.tokens, options) * losses).sum().backward()
    weights = doremi.result(state)
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from doremi_train.methods import ado, cross_entropy, doge, doremi, dro, heuristics, importance, odm


class Objective(Protocol):
    """How token losses become token weights, and what is remembered between steps. K domains, B
    sequences, T tokens."""

    def init(self, domains: int, steps: int, options: Any) -> Any:
        """State (a NamedTuple of tensors) before step 1."""

    def observe(
        self, losses: Tensor, reference: Tensor | None, domain: Tensor, domains: int, options: Any
    ) -> Any:
        """Stats (a NamedTuple of sums with K entries each, `tokens` among them) of losses (B, T),
        reference (B, T), domain (B,)."""

    def update(self, state: Any, stats: Any, options: Any) -> Any:
        """The next state from the sums of the global batch; the same on every rank."""

    def weigh(
        self,
        state: Any,
        domain: Tensor,
        tokens: Tensor,
        options: Any,
        losses: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        """(B, 1) or (B, T) token weights, already divided by the global counts `tokens` (K,).
        `losses` and `reference` (B, T) are for those that weigh token by token."""

    def sampling(self, state: Any, options: Any) -> Tensor:
        """(K,) mixture of the next batch."""

    def record(self, state: Any, stats: Any) -> dict[str, Tensor]:
        """Columns (K,) and numbers () worth a line of `domain_weights.jsonl` after every step;
        empty where nothing moves."""


# Mixtures that the main run adapts while it goes on.
ONLINE: dict[str, Objective] = {"ado": ado, "odm": odm, "dro": dro}

OBJECTIVES: dict[str, Objective] = ONLINE | {
    "cross_entropy": cross_entropy,
    "doremi": doremi,
    "doge": doge,
    "importance": importance,
}

# (sizes (K,), budget in tokens, options) → weights (K,)
HEURISTICS: dict[str, Callable[[Tensor, float, heuristics.Options], Tensor]] = {
    "natural": heuristics.natural,
    "uniform": heuristics.uniform,
    "temperature": heuristics.temperature,
    "unimax": heuristics.unimax,
}
