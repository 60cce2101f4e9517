"""Capture of what per-example gradients are made of, and two routes that need no capture.

One forward with hooks, and one backward for activations alone: no gradient of a parameter is
computed. What it gives is `factors.Examples`; LoRA's scale, dropout and masks are in it
because autograd put them there.

n examples, T tokens of each.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doremi_train.gradients import products
from doremi_train.gradients.factors import Direction, Examples, Factor, Lookup, Outer, Sum
from doremi_train.gradients.products import signs
from doremi_train.gradients.softmax import Softmax, SoftmaxBias
from doremi_train.model.projection import Also, Projection


class Captured(NamedTuple):
    losses: Tensor  # what the forward gave, without a graph
    examples: Examples


class _Use(NamedTuple):
    """One call of a layer."""

    module: Any
    inputs: tuple[Tensor, ...]
    output: Tensor
    dtype: torch.dtype  # in which matrices are multiplied there
    also: Also | None = None
    # Products of the input and of the gradient with their sides of a sketch.
    sketched: list[Tensor] | None = None


# Numbers of the gradient of the logits that are kept; beyond, what is asked of it computes it
# again.
_KEPT = 1 << 24


class NotFactored(ValueError):
    """A trainable parameter whose per-example gradient no rule here gives."""


def capture(
    model: nn.Module,
    forward: Callable[[], Tensor],
    shape: tuple[int, int],
    verify: bool = False,
    sketch: int | None = None,
) -> Captured:
    """Run `forward`, whose losses' sum is differentiated, and factor each example's part of that
    gradient.

    `shape` is (n, T): the model's layers see (n, T, …), or (n · T, …). Raises NotFactored naming
    the parameters that are not those of Linear, Conv1D, Embedding, LayerNorm or RMSNorm layers.
    `verify` also computes the gradient by autograd, and raises ArithmeticError where sums over the
    examples differ from it. Where nothing but a `sketch` of this size and weighted sums will be
    asked for, sums over tokens are taken at once, and the products with its sides while their
    factors are in the cache.
    """
    require_factored(model)
    uses: list[_Use] = []
    frozen: list[nn.Parameter] = []
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        # Which, unlike torch's own, computes what is not asked for.
        if isinstance(module, Projection) and not verify:
            frozen.extend(p for p in module.parameters() if p.requires_grad)
            module.requires_grad_(False)
            module.also = Also(keep=_KEPT)
            if sketch is not None:
                weight = module.weight
                dtype = torch.promote_types(inputs[0].dtype, torch.float32)
                module.also.right, _ = products.signs(
                    names[id(weight)], tuple(weight.shape), sketch, weight.device, dtype
                )
        # Positions are often looked up once for the whole batch; their gradient would be its sum.
        if isinstance(module, nn.Embedding) and len(inputs[0]) == 1 < shape[0]:
            return (inputs[0].expand(shape[0], -1),)
        return None

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        also = None
        if isinstance(module, Projection):
            also, module.also = module.also, None
        while frozen:
            frozen.pop().requires_grad_(True)
        if output.requires_grad:
            kind = output.device.type
            autocast = (
                torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else output.dtype
            )
            uses.append(_Use(module, inputs, output, autocast, also))
            if sketch is not None and not verify and _rule(module) is _linear:
                uses[-1] = _sketched_on_the_way(uses[-1], names[id(module.weight)], sketch)

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for module in model.modules():
            if _rule(module) is not None and _trained(module):
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        losses = forward()
    total = losses.sum()
    expected = _gradient(model, total) if verify else None
    gradients = torch.autograd.grad(total, [use.output for use in uses])
    factors: dict[str, tuple[Factor, ...]] = {}
    with torch.no_grad():
        for use, gradient in zip(uses, gradients, strict=True):
            rule = _rule(use.module)
            assert rule is not None
            for parameter, factor in rule(use, gradient, shape):
                if parameter.requires_grad:
                    if sketch is not None and not verify and isinstance(factor, Sum):
                        factor = Sum(factor.rows(slice(0, None))[:, None])
                    name = names[id(parameter)]
                    factors[name] = (*factors.get(name, ()), factor)
        if expected is not None:
            _verify(
                factors,
                expected,
                shape[0],
                min((g.dtype for g in gradients), key=lambda dtype: dtype.itemsize),
            )
    return Captured(losses.detach(), factors)


def require_factored(model: nn.Module) -> None:
    """Raise NotFactored where the gradient of a trainable parameter cannot be captured."""
    covered = {
        id(p)
        for module in model.modules()
        if _rule(module)
        for p in module.parameters(recurse=False)
    }
    odd = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if odd:
        raise NotFactored(
            f"{', '.join(odd[:5])}: not of a Linear, Conv1D, Embedding, LayerNorm or RMSNorm "
            "layer, so the gradient of one example cannot be told from the batch's"
        )


def _gradient(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of a scalar, by autograd; the graph stays."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        loss, list(named.values()), retain_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), gradients, strict=True)
    }


# ── Rules ───────────────────────────────────────────────────────────────────────────

Factors = Iterator[tuple[nn.Parameter, Factor]]
# Of a call, the gradient of its output, and (n, T).
Rule = Callable[[_Use, Tensor, tuple[int, int]], Factors]


def _linear(use: _Use, gradient: Tensor, shape: tuple[int, int]) -> Factors:
    left = _by_token(gradient, shape)
    right = _by_token(use.inputs[0].detach(), shape).to(left.dtype)  # as autocast multiplied them
    known = None
    if use.sketched is not None:
        of_input, of_gradient = (_by_token(side, shape) for side in use.sketched)
        known = (of_gradient, of_input) if _is_linear(use.module) else (of_input, of_gradient)
    yield (
        use.module.weight,
        Outer(left, right, known) if _is_linear(use.module) else Outer(right, left, known),
    )
    if use.module.bias is not None:
        yield use.module.bias, Sum(left)


def _is_linear(module: nn.Module) -> bool:
    """Whether it is torch's, and not transformers' Conv1D, GPT-2's linear layer, which keeps its
    matrix the other way round."""
    return type(module) is nn.Linear


def _sketched_on_the_way(use: _Use, name: str, sketch: int) -> _Use:
    """The call with the products of the input, made at once, and of the gradient, made in the
    backward, while they are in the cache."""
    x, weight = use.inputs[0].detach(), use.module.weight
    if x.dtype != use.output.dtype:  # under autocast: the factor is a copy, which is not there yet
        return use
    left, right = signs(
        name, tuple(weight.shape), sketch, x.device, torch.promote_types(x.dtype, torch.float32)
    )
    assert right is not None
    of_input, of_gradient = (right, left) if _is_linear(use.module) else (left, right)
    products = [x @ of_input.to(x.dtype)]
    use.output.register_hook(
        lambda gradient: products.append(gradient @ of_gradient.to(gradient.dtype))
    )
    return use._replace(sketched=products)


def _embedding(use: _Use, gradient: Tensor, shape: tuple[int, int]) -> Factors:
    ids = use.inputs[0]
    if use.module.padding_idx is not None:  # whose row torch never trains
        gradient = gradient * (ids != use.module.padding_idx)[..., None]
    yield use.module.weight, Lookup(ids, gradient, len(use.module.weight))


def _norm(use: _Use, gradient: Tensor, shape: tuple[int, int]) -> Factors:
    module, x = use.module, use.inputs[0].detach()
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(
            x.to(torch.promote_types(x.dtype, torch.float32)),
            module.normalized_shape,
            eps=module.eps,
        )
    elif isinstance(module, nn.RMSNorm):
        x = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    else:  # transformers' own are in float32, whatever the model is in
        epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        x = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    if module.weight is not None:
        yield module.weight, Sum(_by_position(gradient * x, shape))
    if getattr(module, "bias", None) is not None:
        yield module.bias, Sum(_by_position(gradient, shape))


def _by_position(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """(n, T, d), the heads of a token added up."""
    return (
        tensor
        if tensor.shape[:-1] == shape
        else tensor.reshape(*shape, -1, tensor.shape[-1]).sum(2)
    )


def _projection(use: _Use, gradient: Tensor, shape: tuple[int, int]) -> Factors:
    hidden, targets, *_ = use.inputs
    hidden, module = hidden.detach().to(use.dtype), use.module
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    right = (hidden * weight[targets].to(hidden.dtype)).to(gradient.dtype).sum(1)
    if bias is not None:
        right = right + bias[targets]
    normalizers = use.output.detach() + right  # the loss is log Σ exp(logits) − the target's logit
    seen = [
        field.reshape(*shape, *field.shape[1:])
        for field in (hidden, targets, normalizers, gradient)
    ]
    also = (
        None if use.also is None else use.also.gradient,
        None if use.also is None else use.also.product,
    )
    whole, known = (None if part is None else part.to(use.dtype).view(*shape, -1) for part in also)
    factor = Softmax(seen[0], seen[1], seen[2], seen[3], weight, bias, known, whole)
    yield module.weight, factor
    if bias is not None:
        yield module.bias, SoftmaxBias(factor)


def _rule(module: nn.Module) -> Rule | None:
    kind = type(module)  # and no subclass: what it does otherwise is not known
    if kind in (nn.LayerNorm, nn.RMSNorm) or (
        kind.__name__.endswith("RMSNorm") and _is_rms_norm(module)
    ):
        return _norm
    if _is_linear(module) or kind.__name__ == "Conv1D":
        return _linear
    return {nn.Embedding: _embedding, Projection: _projection}.get(kind)


def _is_rms_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and (hasattr(module, "variance_epsilon") or hasattr(module, "eps"))


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _by_token(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """(n, T, …)"""
    if tensor.shape[:-1].numel() != shape[0] * shape[1]:
        raise NotFactored(
            f"a layer saw {tuple(tensor.shape)} where {shape[0]} examples of {shape[1]} tokens "
            "were expected, so its tokens cannot be told apart (experts, or convolutions, do this)"
        )
    return tensor.reshape(*shape, tensor.shape[-1])


def _verify(examples: Examples, expected: Direction, n: int, dtype: torch.dtype) -> None:
    """Identities that hold whatever the model is: Σ g_i is the gradient G, Σ ⟨g_i, G⟩ = |G|², and
    1ᵀK1 = |Σ g_i|²."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 5e-2)
    summed = products.weighted(examples, torch.ones(n, device=next(iter(expected.values())).device))
    square = sum(float(gradient.double().square().sum()) for gradient in expected.values())
    if square == 0:
        return
    errors = {
        f"Σ g_i of {name}": _distance(summed.get(name), gradient) / square**0.5
        for name, gradient in expected.items()
    }
    known = {name: gradient for name, gradient in expected.items() if name in examples}
    inner = products.products(examples, (known,))
    errors["Σ ⟨g_i, G⟩"] = abs(float(inner.dots.double().sum()) / square - 1)
    errors["1ᵀK1"] = abs(float(inner.gram.double().sum()) / square - 1)
    for what, error in errors.items():
        if not error <= tolerance:
            raise ArithmeticError(
                f"per-example gradients: {what} is off by {error:.1e}, more than {tolerance:.0e}"
            )


def _distance(gradient: Tensor | None, expected: Tensor) -> float:
    return (
        float((expected.double() - (0 if gradient is None else gradient.double())).square().sum())
        ** 0.5
    )
