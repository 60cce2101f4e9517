"""Per-example gradients in factors against the most naive way, in float64, on transformers' models
built small.

The oracle is vmap(grad) of one example's loss; under dropout, where every call draws another mask,
autograd of each loss of one and the same forward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.models import D, N, T, V, build
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from doremi_train.gradients import capture, directional, factors, products
from doremi_train.model import optim
from doremi_train.model.language_model import LanguageModel
from doremi_train.model.optim import OptimizerOptions


def batch(rows: int = N) -> Tensor:
    """(rows, T + 1); the last row repeats one token, the first two are the same."""
    tokens = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    tokens[1], tokens[-1] = tokens[0], 5
    return tokens


def language_losses(call: Callable[..., Any], tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n, T)"""
    losses = F.cross_entropy(
        call(input_ids=tokens[:, :-1]).logits.mT, tokens[:, 1:], reduction="none"
    )
    return losses if mask is None else losses * mask


class Case(NamedTuple):
    model: nn.Module
    losses: Callable[[], Tensor]  # (N, …)
    dropout: bool = False
    # (call, tokens, mask) → () of one example.
    one: Callable[[Any, Tensor, Tensor], Tensor] | None = None


def plain(kind: str, **more: Any) -> Case:
    model = build(kind, **more)
    tokens, mask = batch(), torch.ones(N, T, dtype=torch.float64)
    mask[2, 3:] = 0  # padding carries no loss
    return Case(
        model,
        lambda: language_losses(model, tokens, mask),
        one=lambda call, tokens, mask: language_losses(call, tokens[None], mask[None]).sum(),
    )


def ours(kind: str, fused: bool, **more: Any) -> Case:
    model = LanguageModel(build(kind, **more))
    tokens = batch()
    at_once = 2 * V if fused else N * T * V

    def losses() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("doremi_train.model.language_model._LOGITS_ON_CPU", at_once)
            patch.setattr("doremi_train.gradients.factors.NUMBERS", 2 * N * T)  # blocks of two rows
            return model(tokens)

    return Case(model, losses, dropout=True)  # the projection's own function has no vmap


def lora(kind: str, targets: list[str]) -> Case:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.3, target_modules=targets, bias="none",
        fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    model = peft.get_peft_model(build(kind), options).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5)
    tokens = batch()

    def losses() -> Tensor:
        torch.manual_seed(3)
        return language_losses(model, tokens)

    return Case(model.train(), losses, dropout=True)


CASES = {
    "llama": lambda: plain("llama"),
    "llama, biases, tied": lambda: plain(
        "llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "gpt_neox": lambda: plain("gpt_neox"),
    "gpt_neox, tied": lambda: plain("gpt_neox", tie_word_embeddings=True),
    "gpt2": lambda: plain("gpt2"),
    "qwen3": lambda: plain("qwen3"),  # norms of every head
    "llama, fused head": lambda: ours("llama", True),
    "gpt2, fused and tied head": lambda: ours("gpt2", True),
    "gpt_neox, plain head": lambda: ours("gpt_neox", False),
    "llama, LoRA": lambda: lora("llama", ["q_proj", "v_proj", "down_proj"]),
    "gpt2, LoRA": lambda: lora("gpt2", ["c_attn"]),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def oracle(case: Case) -> dict[str, Tensor]:
    """{name: (N, *shape)}"""
    named = trained(case.model)
    if case.one is None:
        losses = case.losses()
        rows = [
            torch.autograd.grad(
                loss.sum(), list(named.values()), retain_graph=True, allow_unused=True
            )
            for loss in losses
        ]
        return {
            name: torch.stack([torch.zeros_like(p) if row[i] is None else row[i] for row in rows])
            for i, (name, p) in enumerate(named.items())
        }
    tokens, mask = batch(), torch.ones(N, T, dtype=torch.float64)
    mask[2, 3:] = 0

    def loss(values: dict[str, Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
        call = lambda **inputs: torch.func.functional_call(case.model, values, (), inputs)  # noqa: E731
        return case.one(call, tokens, mask)  # type: ignore[misc]

    values = {name: p.detach() for name, p in named.items()}
    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, tokens, mask)


def flat(rows: dict[str, Tensor]) -> Tensor:
    return torch.cat([rows[name].flatten(1) for name in sorted(rows)], 1)


def captured(case: Case, verify: bool = False) -> factors.Examples:
    return capture.capture(case.model, case.losses, (N, T), verify).examples


def randomly(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {
            name: torch.randn(p.shape, dtype=p.dtype, generator=generator)
            for name, p in trained(model).items()
        }
        for _ in range(count)
    ]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max())
    )


def test_every_route_is_vmap_of_grad(case: Case) -> None:
    rows = oracle(case)
    whole = flat(rows)
    examples = captured(case, verify=True)
    assert set(examples) == set(rows)
    directions = randomly(case.model, 3)
    expected = torch.stack(
        [whole @ flat({k: v[None] for k, v in along.items()})[0] for along in directions], 1
    )
    close(products.dot(examples, directions[0]), expected[:, :1])
    close(products.dot(examples, *directions), expected)
    found = products.products(examples, tuple(directions))
    close(found.dots, expected)
    close(found.gram, whole @ whole.T)
    close(products.norm2(examples), whole.square().sum(1))
    weights = torch.tensor([0.5, 0.0, -2.0, 1.25], dtype=torch.float64)
    keeping = products.products(examples, tuple(directions), keep=10**9)
    close(keeping.gram, found.gram)
    assert keeping.kept and not found.kept
    for kept in (None, keeping.kept):
        for name, gradient in products.weighted(examples, weights, kept).items():
            close(gradient, torch.einsum("n,n...->...", weights, rows[name]))


def test_an_example_of_weight_0_may_be_nan(case: Case) -> None:
    """Such a candidate is never picked; its gradient must not come in as 0 · NaN either."""
    spoilt = torch.tensor([1.0, float("nan"), 1.0, 1.0], dtype=torch.float64)[:, None]
    examples = capture.capture(case.model, lambda: case.losses() * spoilt, (N, T)).examples
    rows, weights = oracle(case), torch.tensor([0.5, 0.0, -2.0, 1.25], dtype=torch.float64)
    for kept in (None, products.products(examples, keep=10**9).kept):
        for name, gradient in products.weighted(examples, weights, kept).items():
            close(gradient, torch.einsum("n,n...->...", weights, rows[name]))


def test_no_more_is_kept_than_asked_for(case: Case) -> None:
    examples = captured(case)
    every = products.products(examples, keep=10**9).kept
    sizes = {name: sum(block.numel() for block in blocks) for name, blocks in every.items()}
    for keep in (0, min(sizes.values()), sum(sizes.values()) // 2):
        some = products.products(examples, keep=keep).kept
        assert sum(sizes[name] for name in some) <= keep and (keep == 0) == (not some)


def test_the_token_route_and_the_row_route_agree(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples, (direction,) = captured(case), randomly(case.model, 1)
    monkeypatch.setattr(factors.Outer, "short", True)
    by_token = products.products(examples, (direction,))
    monkeypatch.setattr(factors.Outer, "short", False)
    monkeypatch.setattr(factors, "NUMBERS", 3 * N * D)  # blocks of three rows
    by_row = products.products(examples, (direction,))
    close(by_token.gram, by_row.gram)
    close(by_token.dots, by_row.dots)


def test_the_cheaper_route_is_taken() -> None:
    wide = factors.Outer(torch.zeros(2, 4, 512), torch.zeros(2, 4, 512))
    long = factors.Outer(torch.zeros(8, 128, 512), torch.zeros(8, 128, 512))
    assert wide.short and not long.short and wide.gram() is not None and long.gram() is None


def test_a_sketch_is_linear_deterministic_and_right_on_average(case: Case) -> None:
    rows, examples = oracle(case), captured(case)
    # The identity where a side is no longer than the sketch: then it is the gradient itself.
    close(products.sketch(examples, 64), products.sketch(captured(case), 64))
    of_rows = torch.stack(
        [products.sketch_of({k: rows[k][i] for k in examples}, 3) for i in range(N)]
    )
    close(products.sketch(examples, 3), of_rows)
    prepared = capture.capture(case.model, case.losses, (N, T), sketch=3).examples
    close(products.sketch(prepared, 3), of_rows)
    # Which it was not prepared for.
    close(products.sketch(prepared, 64), products.sketch(examples, 64))
    exact = products.sketch(examples, 64)
    if max(p.shape[0] for p in trained(case.model).values()) <= 64:
        close(exact @ exact.T, flat(rows) @ flat(rows).T)


def test_random_signs_keep_inner_products_on_average() -> None:
    G, H = torch.randn(2, 40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = H + G
    dots = []
    for draw in range(400):
        one, two = (products.sketch_of({f"layer {draw}": W}, 8) for W in (G, H))
        assert one.shape == (64,)
        dots.append(float(one @ two))
    spread = torch.tensor(dots).std() / len(dots) ** 0.5
    assert abs(sum(dots) / len(dots) - float((G * H).sum())) < 4 * spread


def test_three_validation_examples_are_never_summed_before_the_dot() -> None:
    case = plain("gpt_neox")
    examples = captured(case)
    picked = torch.tensor([0, 2, 3])
    directions = [products.weighted(examples, torch.eye(N, dtype=torch.float64)[i]) for i in picked]
    close(products.dot(examples, *directions), products.gram(examples)[:, picked])


def test_curvature_is_the_hessian_s() -> None:
    case = plain("gpt_neox", attention="sdpa")  # whose softmax is in float64 too
    (direction,) = randomly(case.model, 1)
    named = trained(case.model)
    before = {name: p.detach().clone() for name, p in named.items()}
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.autograd.grad(case.losses().sum(), list(named.values()), create_graph=True)
    along = torch.autograd.grad(
        sum((g * direction[name]).sum() for name, g in zip(named, slope, strict=True)),
        list(named.values()),
    )
    expected = sum(float((h * direction[name]).sum()) for name, h in zip(named, along, strict=True))

    def gradient() -> dict[str, Tensor]:
        return dict(
            zip(named, torch.autograd.grad(case.losses().sum(), list(named.values())), strict=True)
        )

    found = directional.curvature(case.model, gradient, direction, 1e-5)
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(before[name], p) for name, p in named.items())


def test_what_tokens_add_summed_over_a_packed_document_is_its_own() -> None:
    model = build("llama")
    tokens = batch(2)
    # The last token of the first row is padding.
    document = torch.tensor([[0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, 2]])
    same = (document[:, :, None] == document[:, None, :]) & torch.ones(
        T, T, dtype=torch.bool
    ).tril()
    same |= torch.eye(T, dtype=torch.bool)  # padding sees itself
    attention = torch.where(same, 0.0, -1e9).double()[:, None]
    position = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])

    def losses() -> Tensor:
        logits = model(
            input_ids=tokens[:, :-1], attention_mask=attention, position_ids=position
        ).logits
        return F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none") * (document >= 0)

    examples = capture.capture(model, losses, (2, T)).examples
    spans = [(0, slice(0, 3)), (0, slice(3, 5)), (1, slice(0, 6))]
    alone = []
    for row, span in spans:  # each document as the whole batch
        logits = model(input_ids=tokens[row : row + 1, :-1][:, span]).logits[0]
        loss = F.cross_entropy(logits, tokens[row, 1:][span], reduction="sum")
        alone.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        )
    whole = torch.stack(alone)
    direction = dict(zip(trained(model), randomly(model, 1)[0].values(), strict=True))
    along = torch.cat([direction[name].flatten() for name in trained(model)])
    by_token = products.tokens(examples, direction)
    close(torch.stack([by_token[document == m].sum() for m in range(3)]), whole @ along)


def test_a_step_from_factors_is_adamw_s_on_the_subset() -> None:
    case = plain("gpt_neox")
    weights = torch.tensor([0.0, 0.5, 0.0, 0.5], dtype=torch.float64)
    stepped = []
    for subset in (False, True):
        model = build("gpt_neox")
        optimizer = optim.build(model, OptimizerOptions(gradient_clip=None))
        for _ in range(3):
            of_step = case._replace(
                model=model, losses=lambda model=model: language_losses(model, batch())
            )
            if subset:
                (language_losses(model, batch()[[1, 3]]).sum() / 2).backward()
            else:
                for name, gradient in products.weighted(captured(of_step), weights).items():
                    model.get_parameter(name).grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        stepped.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    close(*stepped)


def test_bf16_factors_are_summed_in_float32() -> None:
    model = LanguageModel(build("gpt_neox").float())
    exact = capture.capture(model, lambda: model(batch()), (N, T)).examples
    model.precision = "bf16"
    rounded = capture.capture(model, lambda: model(batch()), (N, T), verify=True).examples
    assert any(
        f.left.dtype == torch.bfloat16
        for u in rounded.values()
        for f in u
        if isinstance(f, factors.Outer)
    )
    (direction,) = randomly(model, 1)
    one, two = (products.products(found, (direction,)) for found in (exact, rounded))
    assert two.gram.dtype == two.dots.dtype == torch.float32
    torch.testing.assert_close(two.gram, one.gram, rtol=0, atol=0.05 * float(one.gram.abs().max()))
    torch.testing.assert_close(
        two.dots, one.dots, rtol=0, atol=0.05 * float(one.gram.diag().sqrt().max() * D)
    )


class Largest(TorchDispatchMode):
    """The most elements of a tensor made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_tensor_of_all_examples_and_parameters_is_ever_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(factors, "NUMBERS", 1000)
    model = build("gpt_neox", intermediate_size=100)
    tokens = batch()
    parameters = sum(p.numel() for p in model.parameters())
    with Largest() as largest:
        examples = capture.capture(model, lambda: language_losses(model, tokens), (N, T)).examples
        products.products(examples, tuple(randomly(model, 1)))
        products.sketch(examples, 4)
        products.weighted(examples, torch.ones(N, dtype=torch.float64))
    assert largest.elements < parameters < N * parameters


def test_verify_finds_what_no_rule_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, D).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + F.linear(x, self.layer.weight)  # a use that no hook sees

    model, x = Twice(), torch.randn(N, T, D, dtype=torch.float64)
    capture.capture(model, lambda: model(x).square().sum(2), (N, T))
    with pytest.raises(ArithmeticError, match=r"Σ g_i of layer\.weight"):
        capture.capture(model, lambda: model(x).square().sum(2), (N, T), verify=True)


def test_an_unknown_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Conv1d(T, T, 1))
    with pytest.raises(capture.NotFactored, match=r"1\.weight, 1\.bias"):
        capture.capture(model, lambda: model(torch.zeros(N, T, D)), (N, T))
    merged = nn.Linear(D, D)
    with pytest.raises(capture.NotFactored, match="cannot be told apart"):
        capture.capture(merged, lambda: merged(torch.zeros(N * T - 1, D)), (N, T))
