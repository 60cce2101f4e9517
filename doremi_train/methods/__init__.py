"""Every paper's numeric core: pure functions on tensors, one file a paper. No processes, no Hydra,
no files.

An *objective* is a module with the functions of `Objective`. The law: `observe` returns sums, the
caller adds them up over micro-batches and ranks, `update` and `weigh` read them back. So the same
step is right on one CPU and many GPUs:

>>> import torch
>>> from doremi_train.methods import doremi
>>> losses = torch.tensor([[2.0, 2.0], [1.5, 2.5], [2.0, 2.0], [1.0, 3.0]])  # (B, T), nats
>>> losses = losses.requires_grad_()  # in the place of a model's
>>> reference = torch.tensor([[0.5], [0.5], [1.5], [1.5]]).expand(4, 2)  # (B, T)
>>> domain = torch.tensor([0, 0, 1, 1])  # (B,)
>>> options, steps = doremi.Options(), 10
>>> state = doremi.init(2, steps, options)
>>> for _ in range(steps):
...     halves = [
...         doremi.observe(losses[rows], reference[rows], domain[rows], 2, options)
...         for rows in (slice(0, 2), slice(2, 4))  # two micro-batches, or two ranks
...     ]
...     stats = doremi.Stats(*(sum(sums) for sums in zip(*halves)))  # 2 K numbers
...     state = doremi.update(state, stats, options)
...     (doremi.weigh(state, domain, stats.tokens, options) * losses).sum().backward()
>>> [round(weight, 2) for weight in doremi.result(state).tolist()]
[0.94, 0.06]
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from doremi_train.methods import ado, cross_entropy, doge, doremi, dro, heuristics, importance, odm


class Objective(Protocol):
    """How token losses become token weights, and what is remembered between steps. K domains, B
    sequences, T tokens."""

    token_wise: bool
    """Whether `weigh` is given the losses too, for it weighs token by token."""

    @property
    def Options(self) -> Callable[..., Any]:
        """Frozen dataclass of what may be chosen; a value that cannot be is refused."""

    def init(self, domains: int, steps: int, options: Any) -> Any:
        """State (a NamedTuple of tensors) before step 1."""

    def observe(
        self, losses: Tensor, reference: Tensor | None, domain: Tensor, domains: int, options: Any
    ) -> Any:
        """Stats (a NamedTuple of sums with K entries each, `tokens` among them) of losses (B, T),
        reference (B, T), domain (B,)."""

    def update(self, state: Any, stats: Any, options: Any) -> Any:
        """The next state from the sums of the global batch; the same on every rank."""

    @property
    def weigh(self) -> Callable[..., Tensor]:
        """(state, domain, tokens, options) → (B, 1) token weights, already divided by the global
        counts `tokens` (K,). Where `token_wise`, (…, losses, reference) → (B, T), of losses (B, T)
        with their gradient and the reference's (B, T), or None."""

    def sampling(self, state: Any, options: Any) -> Tensor:
        """(K,) mixture of the next batch."""

    def record(self, state: Any, stats: Any) -> dict[str, Tensor]:
        """Columns (K,) and numbers () worth a line of `domain_weights.jsonl` after every step;
        empty where nothing moves."""

    def result(self, state: Any) -> Tensor | None:
        """(K,) the mixture that was learned; None where it is given. Raises ValueError where the
        run was too short to learn one."""


# Mixtures that the main run adapts while it goes on.
ONLINE: dict[str, Objective] = {"ado": ado, "odm": odm, "dro": dro}
"""The first domain has the higher losses, above the target that `dro` is given, and is drawn more:

>>> import torch
>>> from doremi_train.methods import ONLINE
>>> losses, domain = torch.tensor([[3.0], [3.0], [1.0], [1.0]]), torch.tensor([0, 0, 1, 1])
>>> for name in ("odm", "dro"):
...     more = {"target_losses": (1.0, 1.0)} if name == "dro" else {}
...     options = ONLINE[name].Options(prior=(0.5, 0.5), high=(0.9, 0.9), every=5, **more)
...     state = ONLINE[name].init(2, 20, options)
...     for _ in range(10):
...         stats = ONLINE[name].observe(losses, None, domain, 2, options)
...         state = ONLINE[name].update(state, stats, options)
...     print(name, [round(weight, 2) for weight in ONLINE[name].sampling(state, options).tolist()])
odm [0.54, 0.46]
dro [0.98, 0.02]
"""

OBJECTIVES: dict[str, Objective] = ONLINE | {
    "cross_entropy": cross_entropy,
    "doremi": doremi,
    "doge": doge,
    "importance": importance,
}
"""The same lines for every objective, of which some weigh token by token:

>>> import torch
>>> from doremi_train.methods import OBJECTIVES, doremi, importance
>>> losses, domain = torch.tensor([[2.0, 1.0], [4.0, 1.0]]), torch.tensor([0, 1])  # (B, T), (B,)
>>> reference = torch.ones(2, 2)
>>> for name, options in {
...     "doremi": doremi.Options(),
...     "importance": importance.Options(policy="rho", keep=0.5, weights=(0.5, 0.5)),
... }.items():
...     objective = OBJECTIVES[name]
...     stats = objective.observe(losses, reference, domain, 2, options)
...     state = objective.update(objective.init(2, 10, options), stats, options)
...     by_token = (losses, reference) if objective.token_wise else ()
...     weights = objective.weigh(state, domain, stats.tokens, options, *by_token)
...     print(name, [[round(weight, 2) for weight in row] for row in weights.tolist()])
doremi [[0.13], [0.37]]
importance [[0.5, 0.0], [0.5, 0.0]]
"""

# (sizes (K,), budget in tokens, options) → weights (K,)
HEURISTICS: dict[str, Callable[[Tensor, float, heuristics.Options], Tensor]] = {
    "natural": heuristics.natural,
    "uniform": heuristics.uniform,
    "temperature": heuristics.temperature,
    "unimax": heuristics.unimax,
}
"""Mixtures of three domains for a run of 1000 tokens:

>>> import torch
>>> from doremi_train.methods import HEURISTICS, heuristics
>>> sizes = torch.tensor([900.0, 90.0, 10.0])  # tokens
>>> for name, mixture in HEURISTICS.items():
...     weights = mixture(sizes, 1000.0, heuristics.Options(temperature=2.0, max_epochs=4.0))
...     print(name, [round(weight, 3) for weight in weights.tolist()])
natural [0.9, 0.09, 0.01]
uniform [0.333, 0.333, 0.333]
temperature [0.703, 0.222, 0.074]
unimax [0.6, 0.36, 0.04]
"""
