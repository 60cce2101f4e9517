"""Causal language models from a transformers config, and their per-token losses.

B sequences, T tokens, V vocabulary, d hidden size.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doremi_train.model.projection import Projection

# Where the projection is fused with the loss. Logits that may exist at once: where there are more
# it is, in chunks of so many. And a hidden size up to which it always is on a CPU, for computing
# the logits again then takes less time than moving them through memory. Seen there on one thread,
# 2026-11-21, fused over plain: of a training step 0.87 for tiny (d = 64), 0.98 for mini (128), 1.02
# for small (256) with 1024 entries; of the projection alone with 8 M logits or more 0.65 to 0.75
# for d = 64, 0.9 to 1.1 for 256. On a GPU matrices must be large; that number is not measured.
_LOGITS_ON_CPU, _LOGITS_ELSEWHERE = 1 << 22, 1 << 26
NARROW_ON_CPU = 128


INNER = "inner."  # before the names of the transformers model


class Source(Protocol):
    """Values of a transformers model's tensors by name, on the host."""

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        """All of it, or these rows."""


class LanguageModel(nn.Module):
    """A transformers causal model whose forward gives per-token losses, so that a wrapper (DDP, …)
    sees one call."""

    source: Source | None = None  # of the values that an engine fills in, of shapes alone

    def __init__(
        self,
        inner: Any,
        activation_checkpointing: bool = False,
        precision: str = "fp32",
        plain: bool | None = None,
    ) -> None:
        """`plain`: as `head_is_plain`, for one that cannot be asked because it has no values."""
        super().__init__()
        self.inner = inner
        inner.config.use_cache = False
        if activation_checkpointing:
            inner.activation_checkpointing_enable({"use_reentrant": False})
        self.precision = precision  # of the forward and backward; parameters stay float32
        plain = head_is_plain(inner) if plain is None else plain
        self.projection = Projection(inner.get_output_embeddings()) if plain else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Losses (B, T), float32 nats, of targets tokens[:, 1:] given inputs tokens[:, :-1]; tokens
        (B, T + 1)."""
        # Here and not around the call, because wrappers such as DeepSpeed's switch autocast off.
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._losses(tokens)

    def blocks(self) -> list[nn.Module]:
        """The transformer's layers, in order: what is sharded, and compiled, one by one."""
        names = set(self.inner._no_split_modules or ())
        return [module for module in self.inner.modules() if type(module).__name__ in names]

    def groups(self) -> list[list[nn.Module]]:
        """The same and more: see `groups`."""
        return groups(self.inner, [] if self.projection is None else [self.projection])

    def _losses(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        vocabulary, device, project = (
            self.inner.config.vocab_size,
            tokens.device.type,
            self.projection,
        )
        if project is None or not fuses(targets.numel(), vocabulary, project.hidden_size, device):
            return _cross_entropy(self.inner(input_ids=inputs).logits, targets)
        hidden = self.inner.base_model(input_ids=inputs).last_hidden_state  # (B, T, d)
        at_once = logits_at_once(targets.numel(), vocabulary, device)
        return project(hidden.flatten(0, 1), targets.flatten(), at_once).view(targets.shape).float()


class CompletionModel(LanguageModel):
    """The same where some tokens carry no loss: those are given as their complement ~id, and their
    loss is 0."""

    def forward(self, tokens: Tensor) -> Tensor:
        carrying = tokens >= 0
        return (
            super()
            .forward(torch.where(carrying, tokens, ~tokens))
            .masked_fill(~carrying[:, 1:], 0.0)
        )


def groups(inner: Any, beside: Sequence[nn.Module] = ()) -> list[list[nn.Module]]:
    """Modules whose parameters are needed at the same time, and by nothing else: what transformers
    does not split (layers, most of all), then the embedding, and the output projection with what
    is `beside` the model and shares its parameters. No module is in two of them. Tied weights are
    in none, for they are needed from first to last."""
    names, head = set(inner._no_split_modules or ()), inner.get_output_embeddings()
    candidates = [[module] for module in inner.modules() if type(module).__name__ in names]
    candidates += [[inner.get_input_embeddings()], *([] if head is None else [[head, *beside]])]
    owners: dict[int, set[int]] = {}
    for module in (*inner.modules(), *beside):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    found: list[list[nn.Module]] = []
    taken: set[int] = set()
    for group in candidates:
        members = {id(module) for one in group for module in one.modules()}
        alone = all(owners[id(p)] <= members for one in group for p in one.parameters())
        if alone and taken.isdisjoint(members):
            found.append(group)
            taken |= members
    return found


def fuses(tokens: int, vocabulary: int, hidden_size: int, device: str) -> bool:
    """Whether the loss of so many tokens is computed without their logits; on a `device` of this
    type, cpu or cuda."""
    narrow = device == "cpu" and hidden_size <= NARROW_ON_CPU
    return narrow or logits_at_once(tokens, vocabulary, device) < tokens * vocabulary


def logits_at_once(tokens: int, vocabulary: int, device: str) -> int:
    """How many logits of so many tokens exist at one time."""
    return min(tokens * vocabulary, _LOGITS_ON_CPU if device == "cpu" else _LOGITS_ELSEWHERE)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(…, V), (…) → (…) float32. No float32 copy of all the logits is kept where they are bf16."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.float().view(targets.shape)


def head_is_plain(inner: Any) -> bool:
    """Whether the logits are the output embedding of the last hidden state and nothing more (no
    cap, no scale)."""
    probe = torch.arange(4, device=inner.device).remainder(inner.config.vocab_size)[None]
    was_training = inner.training
    inner.eval()
    with torch.no_grad(), contextlib.suppress(AttributeError, TypeError):
        hidden = inner.base_model(input_ids=probe).last_hidden_state
        head = inner.get_output_embeddings()
        plain = isinstance(head, nn.Linear) and torch.equal(
            head(hidden), inner(input_ids=probe).logits
        )
        inner.train(was_training)
        return plain
    inner.train(was_training)
    return False


_PROBED = 16  # tokens
# Movement of earlier logits over that of later ones. Experts computed together move 2e-6 by
# rounding alone; encoders as they are initialised move 2e-5 and more.
_MOVED = 1e-4


def sees_ahead(inner: Any) -> bool:
    """Whether what a transformers model says of a token depends on later ones: they are changed,
    and nothing before them may move. Where so little does that it may be rounding, gradients
    decide, which are exactly 0 where nothing is seen."""
    config = inner.config.get_text_config()
    length = min(_PROBED, getattr(config, "max_position_embeddings", None) or _PROBED)
    tokens = torch.arange(length, device=inner.device).remainder(config.vocab_size)[None]
    changed, half = tokens.clone(), length // 2
    changed[:, half:] = changed[:, half:].flip(1)
    with _looking(inner):
        with torch.no_grad():
            one, two = (inner(input_ids=given).logits for given in (tokens, changed))
        moved = (one - two).abs().amax((0, 2))  # (T,)
        part = float(moved[:half].max() / moved[half:].max())
        return part > _MOVED or (part > 0 and _depends(inner, tokens, half))


def try_training(inner: Any) -> None:
    """One forward as in training, which raises what the model raises there alone, as of a dropout
    that is no probability. Nothing is drawn from torch's generator."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=inner.device)
    with _looking(inner), torch.no_grad(), torch.random.fork_rng(devices=[]):
        inner.train()(input_ids=tokens)


@contextlib.contextmanager
def _looking(inner: Any) -> Iterator[None]:
    """Switch off dropout, and the cache, which not all layers have; then put both back."""
    was_training, cached = inner.training, getattr(inner.config, "use_cache", None)
    inner.eval()
    inner.config.use_cache = False
    try:
        yield
    finally:
        inner.train(was_training)
        if cached is None:
            del inner.config.use_cache
        else:
            inner.config.use_cache = cached


def _depends(inner: Any, tokens: Tensor, half: int) -> bool:
    """Whether logits before `half` have a gradient with respect to embeddings from there on."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = inner.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = inner(input_ids=tokens).logits[:, :half]
            (gradient,) = torch.autograd.grad(logits.square().sum(), embedded[0])
    finally:
        hook.remove()
    return bool(gradient[:, half:].any())


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones once) and the buffers that are saved, by name."""
    saved = model.state_dict(keep_vars=True).keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def trained_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same without frozen parameters, which are as they were at the start."""
    yield from (
        (name, tensor)
        for name, tensor in tensors_of(model)
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    )
