"""DoGE against the most naive way, in float64, and under the one trainer: parts, processes, a stop,
a target."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Command
from helpers.corpus import documents, write_jsonl
from helpers.models import build
from helpers.processes import lines, read
from torch import Tensor

from doremi_train.data.batches import MicroBatch
from doremi_train.methods import doge
from doremi_train.methods.doge import Options, Stats
from doremi_train.model.language_model import LanguageModel
from doremi_train.training.domain_gradients import DomainGradients, Target

K, T = 3, 5


def gradients(seed: int) -> Tensor:
    return torch.randn(K, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stats(found: tuple[Tensor, Tensor], tokens: float = 10.0) -> Stats:
    return Stats(torch.zeros(K), torch.full((K,), tokens, dtype=torch.float64), *found)


def naive(
    steps: list[tuple[list[list[float]], list[float] | None]], eta: float, c: float, normal: bool
) -> list[Any]:
    """Algorithm 1 in plain Python: α_1 … α_T, then ᾱ."""
    alpha, path = [1 / K] * K, []
    for g, target in steps:
        size = range(len(g[0]))
        gains = []
        for k in range(K):
            towards = target or [sum(g[j][i] for j in range(K) if j != k) for i in size]
            gains.append(sum(g[k][i] * towards[i] for i in size))
        if normal:
            mean = sum(math.sqrt(sum(x * x for x in row)) for row in g) / K
            gains = [gain / mean for gain in gains]
        raised = [a * math.exp(eta * gain) for a, gain in zip(alpha, gains, strict=True)]
        alpha = [(1 - c) * a / sum(raised) + c / K for a in raised]
        path.append(alpha)
    return [*path, [sum(column) / len(path) for column in zip(*path, strict=True)]]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("normal", [False, True])
def test_equals_the_naive_algorithm(targeted: bool, normal: bool) -> None:
    options = Options(step_size=0.3, smoothing=0.01, normalize=normal)
    steps = [(gradients(seed), gradients(seed + 50)[0] if targeted else None) for seed in range(4)]
    listed = [(g.tolist(), None if target is None else target.tolist()) for g, target in steps]
    *path, average = naive(listed, 0.3, 0.01, normal)
    state = doge.init(K, 4, options)
    for (found, target), expected in zip(steps, path, strict=True):
        halves = [  # two parameters, which add up
            doge.align(found[:, part], None if target is None else target[part])
            for part in (slice(3), slice(3, None))
        ]
        state = doge.update(
            state, stats(tuple(a + b for a, b in zip(*halves, strict=True))), options
        )  # type: ignore[arg-type]
        torch.testing.assert_close(
            state.weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )
    torch.testing.assert_close(
        doge.result(state), torch.tensor(average, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_a_domain_that_pulls_the_other_way_loses_and_the_target_s_own_gains() -> None:
    g = torch.eye(4, 5, dtype=torch.float64)[[0, 0, 1]] * torch.tensor([[1.0], [1.0], [1.0]])
    g[2] = -g[0]
    alone = doge.update(doge.init(K, 1, Options()), stats(doge.align(g, None)), Options())
    assert alone.weights[0] == alone.weights[1] > alone.weights[2]
    target = torch.zeros(5, dtype=torch.float64)
    target[0] = -1
    aimed = doge.update(doge.init(K, 1, Options()), stats(doge.align(g, target)), Options())
    assert aimed.weights[2] > aimed.weights[0] == aimed.weights[1]


def test_an_absent_domain_is_aligned_with_nothing() -> None:
    g = gradients(0)
    g[1] = 0
    found = stats(doge.align(g, None))
    found.tokens[1] = 0
    state = doge.update(doge.init(K, 1, Options()), found, Options())
    assert float(state.alignment[1]) == 0 and torch.isfinite(state.weights).all()
    norms = g[[0, 2]].norm(dim=1).mean()
    torch.testing.assert_close(state.alignment[0], (g[0] @ g[2]) / norms)


# ── Gradients of domains ────────────────────────────────────────────────────────────


def micro(seed: int, rows: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(13, (rows, T + 1), generator=generator)
    return MicroBatch(tokens, torch.randint(K - 1, (rows,), generator=generator), torch.zeros(rows))


@pytest.mark.parametrize("tied", [False, True])
def test_the_factored_engine_gives_what_autograd_gives(tied: bool) -> None:
    model = LanguageModel(build("gpt_neox", tie_word_embeddings=tied))
    parts = [micro(0, 4), micro(1, 3), micro(2, 0)]
    target = torch.randint(13, (6, T + 1), generator=torch.Generator().manual_seed(5))
    domain = torch.cat([part.domain for part in parts])
    counts = torch.bincount(domain, minlength=K).double() * T
    named = dict(model.named_parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(named.values()))])

    losses = model(torch.cat([part.tokens for part in parts]))
    means = torch.zeros(K, sum(p.numel() for p in named.values()), dtype=torch.float64)
    for k in range(K - 1):  # the last domain is absent
        means[k] = (
            gradient(model(torch.cat([part.tokens for part in parts])[domain == k]).sum())
            / counts[k]
        )
    for aimed in (target, target[:0]):
        found = DomainGradients(model, K, Target(aimed, 4), torch.device("cpu"))
        found.begin()
        seen = [found.add(part) for part in parts]
        torch.testing.assert_close(torch.cat(seen), losses.detach(), rtol=1e-6, atol=1e-6)
        alignment, square = found.align(counts, step=1)
        towards = gradient(model(target[[4, 5, 0, 1]]).mean()) if len(aimed) else None
        expected = doge.align(means, towards)
        torch.testing.assert_close(alignment, expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(square, expected[1], rtol=1e-10, atol=1e-12)
        weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        found.write(weights / counts.clamp_min(1))
        written = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
        torch.testing.assert_close(written, weights @ means, rtol=1e-10, atol=1e-12)
        model.zero_grad()


# ── Under the trainer ───────────────────────────────────────────────────────────────

DOGE = ("mixture=doge", "stage=proxy", "seed=33")


@pytest.fixture(scope="module")
def alone(tiny: list[str], command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("doge") / "run"
    outcome = command(*tiny, *DOGE, "stage=main", "main.comparisons=[]", f"run_dir={run_dir}")
    assert outcome.code == 0, outcome
    return run_dir


def test_the_mixture_is_the_average_of_the_trace(alone: Path) -> None:
    trace, mixture = lines(alone / "proxy/domain_weights.jsonl"), read(alone / "weights.json")
    assert (
        len(trace) == 12
        and mixture["method"] == "doge"
        and set(mixture["epochs"]) == {"digits", "plain", "rich"}
    )
    for name, weight in mixture["weights"].items():
        assert weight == pytest.approx(sum(line["weights"][name] for line in trace) / 12, abs=1e-12)
    weights = dict.fromkeys(mixture["weights"], 1 / 3)
    for line in trace:  # anyone can compute it again
        raised = {name: weights[name] * math.exp(0.1 * line["alignment"][name]) for name in weights}
        weights = {
            name: 0.999 * value / sum(raised.values()) + 0.001 / 3 for name, value in raised.items()
        }
        assert line["weights"] == pytest.approx(weights, abs=1e-12)


def same_trace(one: Path, two: Path, tolerance: float = 1e-6) -> None:
    for a, b in zip(
        *(lines(run / "proxy/domain_weights.jsonl") for run in (one, two)), strict=True
    ):
        assert a["tokens"] == b["tokens"] and a["weights"] == pytest.approx(
            b["weights"], abs=tolerance
        )


def test_parts_of_a_batch_are_the_batch(
    alone: Path, fresh: list[str], command: Command, tmp_path: Path
) -> None:
    assert (
        command(*fresh, *DOGE, "training.micro_batch_size=3", f"run_dir={tmp_path / 'run'}").code
        == 0
    )
    same_trace(alone, tmp_path / "run")


@pytest.mark.acceptance
def test_two_processes_give_the_weights_of_one(
    alone: Path, fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    outcome = doremi(*fresh, *DOGE, f"run_dir={tmp_path / 'run'}", processes=2)
    assert outcome.code == 0, outcome.err
    same_trace(alone, tmp_path / "run")


def test_stopped_it_continues_to_the_same_bits(
    fresh: list[str], alone: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from doremi_train.storage.runs import stop

    really, calls = doge.update, []

    def update(*arguments: Any) -> doge.State:
        calls.append(1)
        stop.requested = len(calls) == 5
        return really(*arguments)

    monkeypatch.setattr(doge, "update", update)
    overrides = [*fresh, *DOGE, f"run_dir={tmp_path / 'run'}"]
    assert command(*overrides).code == 75
    assert command(*overrides).code == 0
    for name in ("proxy/domain_weights.jsonl", "proxy/model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.slow
def test_a_target_and_seeds(tiny: list[str], command: Command, tmp_path: Path) -> None:
    target = write_jsonl(tmp_path / "target.jsonl", list(documents(7, "0123456789", 200, 20_000)))
    run_dir = tmp_path / "run"
    overrides = [
        *tiny,
        *DOGE,
        "doge.step_size=1",
        "proxy.seeds=2",
        f"run_dir={run_dir}",
        "target.sequences=16",
    ]
    outcome = command(*overrides, f"target.files=[{target}]", "training.steps=30", "stage=plan")
    assert outcome.code == 0, outcome
    assert read(run_dir / "plan.json")["stages"]["proxy/round-1/seed-1"]["state"] == "new"
    outcome = command(*overrides, f"target.files=[{target}]", "training.steps=30", "stage=proxy")
    assert outcome.code == 0, outcome
    results = [
        json.loads(path.read_text())["weights"]
        for path in sorted(run_dir.glob("proxy/round-1/*/result.json"))
    ]
    assert len(results) == 2 and results[0] != results[1]
    for weights in results:  # the target is digits
        assert max(weights, key=lambda name: weights[name]) == "digits"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["proxy.rounds=2"], "leave it at 1"),
        (["target.domains=[nowhere]"], "target.domains: nowhere"),
        (["engine.compile=true"], "without engine.compile"),
        (["target.files=[none.jsonl]"], "none.jsonl"),
    ],
)
def test_a_mistake_is_named(
    overrides: list[str], said: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    outcome = command(*tiny, *DOGE, "seed=9", *overrides, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 2 and said in outcome.err, outcome
