"""Cross-entropy fused with the output projection, against plain logits: values, gradients,
precision, memory.

N tokens, d hidden size, V vocabulary.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from doremi_train.model import configs, folders, optim
from doremi_train.model.configs import ModelOptions
from doremi_train.model.optim import OptimizerOptions
from doremi_train.model.projection import Projection

N, D, V = 7, 5, 11


class Case(NamedTuple):
    head: nn.Linear
    hidden: Tensor  # (N, d)
    targets: Tensor  # (N,)
    weights: Tensor  # (N,) of the losses


def case(bias: bool, dtype: torch.dtype, shape: tuple[int, int, int] = (N, D, V)) -> Case:
    tokens, width, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=bias, dtype=dtype)
    for parameter in head.parameters():
        parameter.data.normal_(generator=generator)
    hidden = torch.randn(tokens, width, dtype=dtype, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return Case(head, hidden, targets, torch.rand(tokens, dtype=dtype, generator=generator))


def gradients(of: Case, losses: Tensor) -> list[Tensor]:
    return list(
        torch.autograd.grad((of.weights * losses).sum(), [of.hidden, *of.head.parameters()])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "logits", [1, 3 * V, N * V, 1000 * V]
)  # a token at a time, three, all, more than there are
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_plain_logits_in_float64(bias: bool, logits: int) -> None:
    of = case(bias, torch.float64)
    fused = Projection(of.head)
    assert torch.autograd.gradcheck(
        lambda hidden, *_: fused(hidden, of.targets, logits), (of.hidden, *of.head.parameters())
    )
    losses = fused(of.hidden, of.targets, logits)
    expected = F.cross_entropy(of.head(of.hidden), of.targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-14)
    for found, right in zip(gradients(of, losses), gradients(of, expected), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-14)


def test_losses_of_sure_and_of_hopeless_predictions_do_not_overflow() -> None:
    of = case(False, torch.float32)
    with torch.no_grad():
        losses = Projection(of.head)(1e4 * of.hidden, of.targets, 2 * V)
        expected = F.cross_entropy(of.head(1e4 * of.hidden), of.targets, reduction="none")
    assert losses.max() > 1e4
    torch.testing.assert_close(losses, expected)


def test_a_loss_that_is_not_a_number_is_not_hidden() -> None:
    of = case(False, torch.float32)
    hidden = of.hidden.detach().clone()
    hidden[2, 0] = torch.inf
    losses = Projection(of.head)(hidden, of.targets, 2 * V)
    assert losses.isfinite().tolist() == [n != 2 for n in range(N)]


def test_only_the_gradients_that_are_needed_are_computed() -> None:
    of = case(True, torch.float32)
    of.head.weight.requires_grad_(False)
    Projection(of.head)(of.hidden, of.targets, 2 * V).sum().backward()
    assert (
        of.head.weight.grad is None and of.hidden.grad is not None and of.head.bias.grad is not None
    )


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_products_are_bf16_and_the_softmax_float32(bias: bool) -> None:
    of = case(bias, torch.float32, (64, 32, 500))
    with torch.autocast("cpu", torch.bfloat16):
        fused = Projection(of.head)(of.hidden, of.targets, 10 * 500)
        plain = F.cross_entropy(of.head(of.hidden), of.targets, reduction="none")
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-6)  # the same rounded products
    exact = F.cross_entropy(of.head(of.hidden), of.targets, reduction="none")
    assert (fused - exact).abs().max() > 1e-4
    for found, theirs, right in zip(
        *(gradients(of, losses) for losses in (fused, plain, exact)), strict=True
    ):
        assert found.dtype == torch.float32
        error, usual = ((x - right).norm() / right.norm() for x in (found, theirs))
        assert error < max(1.2 * usual, 1e-3)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        self.elements = max(
            [
                self.elements,
                *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)),
            ]
        )
        return out


def test_no_more_logits_exist_than_were_asked_for() -> None:
    of = case(False, torch.float32, (1000, 4, 200))
    with Largest() as largest:
        Projection(of.head)(of.hidden, of.targets, 30 * 200).sum().backward()
    assert 29 * 200 < largest.elements <= 30 * 200
    with Largest() as largest:
        F.cross_entropy(of.head(of.hidden), of.targets, reduction="none").sum().backward()
    assert largest.elements == 1000 * 200  # the measure sees them where they are


def peak(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has given out at a time meanwhile, beyond those
    before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    found = profile.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]"
    )
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_peak_memory_of_a_step_does_not_depend_on_the_vocabulary(fused: bool) -> None:
    """Without the embedding's own gradient. The same measure sees how it grows where logits are
    plain."""
    peaks = []
    for vocabulary in (1 << 13, 1 << 17):
        options = ModelOptions(**configs.preset("nano", "model"))
        language_model = folders.build(configs.resolve(options, vocabulary, 0, 128), 0)
        if not fused:
            language_model.projection = None
        optimizer = optim.build(language_model, OptimizerOptions())
        tokens = torch.randint(vocabulary, (8, 129), generator=torch.Generator().manual_seed(0))

        def step(
            of: nn.Module = language_model,
            by: torch.optim.Optimizer = optimizer,
            on: Tensor = tokens,
        ) -> None:
            of(on).mean().backward()
            by.step()
            by.zero_grad()

        step()  # with the optimiser's states
        peaks.append(peak(step) - 4 * vocabulary * language_model.inner.config.hidden_size)
    assert peaks[1] / peaks[0] == pytest.approx(1 if fused else 16, rel=0.1)


@pytest.mark.slow
def test_it_compiles_to_the_same_numbers() -> None:
    of = case(True, torch.float32, (50, 16, 40))
    fused = Projection(of.head)
    eager = fused(of.hidden, of.targets, 20 * 40)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")(
        of.hidden, of.targets, 20 * 40
    )
    torch.testing.assert_close(compiled, eager)
    for found, right in zip(gradients(of, compiled), gradients(of, eager), strict=True):
        torch.testing.assert_close(found, right)
