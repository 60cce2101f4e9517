"""Online mixtures: each paper's update against the most naive way, caps, and the main run that they
steer."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command import Command
from helpers.processes import lines, read
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from doremi_train.methods import ONLINE, ado, dro, odm, online
from doremi_train.methods.online import Drawn, Options, Stats

K = 3
FREE = {"prior": (0.5, 0.3, 0.2), "high": (1.0, 1.0, 1.0), "floor": 0.0, "warmup": 0.0, "every": 1}


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(losses: list[float], tokens: list[float]) -> Stats:
    """Sums of a batch with these mean losses and tokens per domain."""
    return Stats(float64(losses) * float64(tokens), float64(tokens))


# ── ODM ─────────────────────────────────────────────────────────────────────────────


def test_odm_equals_the_naive_bandit() -> None:
    state, options = odm.init(K, 20, Options(**FREE)), Options(**FREE)
    pi, reward = list(FREE["prior"]), [0.0] * K  # type: ignore[call-overload]
    for t in range(1, 19):
        losses, tokens = [4.0 - 0.1 * t, 2.0 + math.sin(t), 1.0], [10.0, 20.0, 30.0 * (t % 2)]
        total = sum(tokens)
        for k in range(K):
            reward[k] = 0.9 * reward[k] + 0.1 * (losses[k] * tokens[k] / total) / pi[k]
        now, then = (min(1 / K, math.sqrt(math.log(K) / (K * s))) for s in (t, t + 1))
        raised = [math.exp(now * r) for r in reward]
        pi = [(1 - K * then) * value / sum(raised) + then for value in raised]
        state = odm.update(state, batch(losses, tokens), options)
        torch.testing.assert_close(state.weights, float64(pi), rtol=1e-12, atol=1e-14)


def test_odm_draws_more_of_what_has_higher_loss_and_explores_all() -> None:
    state, options = odm.init(K, 1000, Options(**FREE)), Options(**FREE)
    for _ in range(200):
        state = odm.update(state, batch([3.0, 2.0, 1.0], (1000 * state.weights).tolist()), options)
    assert state.weights[0] > state.weights[1] > state.weights[2] >= odm.exploration(201, K)
    # In the long run the loss itself.
    torch.testing.assert_close(state.reward, float64([3.0, 2.0, 1.0]))


# ── ADO ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "law", [(1.5, 4.0, 0.3), (0.0, 3.0, 0.1), (2.0, 0.0, 0.4), (0.5, 8.0, 0.77)]
)
def test_ado_finds_the_law_of_a_curve(law: tuple[float, float, float]) -> None:
    floor, scale, exponent = law
    n = torch.arange(1, 41, dtype=torch.float64) * 10
    losses = floor + scale * n**-exponent
    tokens = torch.linspace(1, 3, 40, dtype=torch.float64)[:, None].expand(-1, 2)
    found = ado.fit(n, losses[:, None] * tokens, tokens, 400.0)
    predicted = found.floor + found.above * (n[:, None] / 400) ** -found.exponent
    torch.testing.assert_close(predicted[:, 0], losses, rtol=1e-9, atol=1e-9)
    if scale:
        assert float(found.exponent[0]) == pytest.approx(exponent, abs=1e-6)
        assert float(found.floor[1]) == pytest.approx(floor, abs=1e-6)


def test_ado_fits_as_least_squares_does_where_there_is_noise() -> None:
    from scipy import optimize

    generator = torch.Generator().manual_seed(0)
    n = torch.arange(1, 61, dtype=torch.float64) * 5
    losses = 2 + 5 * n**-0.35 + 0.02 * torch.randn(60, generator=generator, dtype=torch.float64)
    ones = torch.ones(60, 1, dtype=torch.float64)
    found = ado.fit(n, losses[:, None], ones, 300.0)
    mine = found.floor + found.above * (n / 300) ** -found.exponent - losses
    best = optimize.least_squares(
        lambda x: x[0] + x[1] * n.numpy() ** -x[2] - losses.numpy(), [1, 3, 0.3]
    )
    # Α stands on a grid.
    assert float(mine.square().sum()) == pytest.approx(2 * best.cost, rel=1e-3)


def naive_ado(options: Options, steps: int, batches: list[Stats]) -> list[list[float]]:
    """The lines of the module's docstring; the law itself is tested above."""
    prior, recent, average, path = list(options.prior), list(options.prior), list(options.prior), []
    history: list[Stats] = []
    for t, stats in enumerate(batches, 1):
        history.append(stats)
        total = float(stats.tokens.sum())
        recent = [
            0.9 * h + 0.1 * float(n) / total for h, n in zip(recent, stats.tokens, strict=True)
        ]
        pieces = max(1, steps // ado.PIECES)
        grouped = [history[i : i + pieces] for i in range(0, t, pieces)]
        n = float64([(i + 0.5) * pieces for i in range(len(grouped))])
        loss, tokens = (
            torch.stack([sum(getattr(s, f) for s in group) for group in grouped])
            for f in ("loss", "tokens")
        )  # type: ignore[arg-type, misc]
        law = ado.fit(n, loss, tokens, t)
        speed = [max(float(law.exponent[k]), 0.05) * float(law.above[k]) / t for k in range(K)]
        rho = [prior[k] * math.sqrt(recent[k]) * speed[k] for k in range(K)]
        rho = [max(value / sum(rho), options.floor) for value in rho] if sum(rho) else prior
        rho = [value / sum(rho) for value in rho]
        path.append([0.9 * average[k] + 0.1 * rho[k] for k in range(K)])
        average = [average[k] + (rho[k] - average[k]) / (t + 1) for k in range(K)]
    return path


def test_ado_equals_the_naive_way() -> None:
    options = Options(**(FREE | {"floor": 0.02}))
    batches = [batch([1 + 5 / t**0.5, 2.0, 3 - 0.001 * t], [16.0, 8.0, 8.0]) for t in range(1, 100)]
    state = ado.init(K, 100, options)
    for stats, expected in zip(batches, naive_ado(options, 100, batches), strict=True):
        state = ado.update(state, stats, options)
        torch.testing.assert_close(state.weights, float64(expected), rtol=1e-9, atol=1e-12)
    assert state.weights[0] > options.prior[0]  # the one that still learns


# ── DRO ─────────────────────────────────────────────────────────────────────────────


def test_dro_equals_the_naive_way() -> None:
    options = dro.Options(**(FREE | {"every": 2}), step_size=0.7, target_losses=(2.0, 2.0, 2.0))
    state, alpha, since = dro.init(K, 40, options), list(FREE["prior"]), []  # type: ignore[call-overload]
    for t in range(1, 20):
        since.append(([2 + 3 / t, 1.5, 2.0 + 0.1 * t], [10.0, 5.0, 10.0 * (t > 4)]))
        state = dro.update(state, batch(*since[-1]), options)
        if t % 2 == 0:
            excess = []
            for k in range(K):
                tokens = sum(count[k] for _, count in since)
                mean = sum(loss[k] * count[k] for loss, count in since) / tokens if tokens else 0.0
                excess.append(max(mean - 2.0, 0.0) if tokens else 0.0)
            raised = [a * math.exp(0.7 * e) for a, e in zip(alpha, excess, strict=True)]
            alpha, since = [value / sum(raised) for value in raised], []
            torch.testing.assert_close(state.excess, float64(excess), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(state.weights, float64(alpha), rtol=1e-9, atol=1e-12)


# ── What they share ─────────────────────────────────────────────────────────────────


def options_of(name: str, **changes: Any) -> Options:
    common = FREE | changes
    return (
        dro.Options(**common, target_losses=(1.0, 1.0, 1.0)) if name == "dro" else Options(**common)
    )


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from(sorted(ONLINE)),
    st.integers(0, 1 << 20),
    st.floats(0.05, 0.4),
    st.floats(0, 0.05),
)
def test_no_domain_ever_gets_more_than_its_cap_nor_less_than_the_floor(
    name: str, seed: int, cap: float, floor: float
) -> None:
    method, steps = ONLINE[name], 40
    options = options_of(name, high=(cap, 1.0, 0.6), floor=floor, warmup=0.1, every=4)
    generator, state, drawn = (
        torch.Generator().manual_seed(seed),
        method.init(K, steps, options),
        torch.zeros(K),
    )
    for step in range(steps):
        weights = method.sampling(state, options)
        assert (
            float(weights.sum()) == pytest.approx(1)
            and float(weights.min()) >= min(floor, cap) / 2 - 1e-9
        )
        drawn = drawn + weights / steps
        if step < 4:
            assert weights[0] <= cap + 1e-9
        losses = 5 * torch.rand(K, generator=generator, dtype=torch.float64)
        state = method.update(state, Stats(losses * weights * 1e4, weights * 1e4), options)
    assert (drawn <= float64(options.high) + 1e-9).all()


def test_the_prior_is_drawn_from_until_the_warm_up_is_over() -> None:
    for name, method in ONLINE.items():
        options = options_of(name, warmup=0.5, every=2)
        state = method.init(K, 20, options)
        for step in range(1, 20):
            # They fall: where nothing is learned, ado keeps to the prior.
            losses = [50 * step**-0.5, 10 * step**-0.1, 30 * step**-0.3]
            state = method.update(state, batch(losses, [10.0, 10.0, 10.0]), options)
            moved = not torch.allclose(
                method.sampling(state, options), float64(options.prior), atol=1e-9
            )
            assert moved == (step >= 10), (name, step)


def test_what_is_left_of_the_cap_is_spread_over_the_rest() -> None:
    options = Options(**(FREE | {"high": (0.2, 1.0, 1.0)}))
    # 0.15 of 0.2 after half of the run.
    used = Drawn(float64([30.0, 50.0, 20.0]), torch.tensor(5), torch.tensor(10))
    found = online.within(float64([0.6, 0.2, 0.2]), used, options)
    torch.testing.assert_close(found, float64([0.1, 0.45, 0.45]))


# ── The main run ────────────────────────────────────────────────────────────────────

ADAPTS = ("stage=main", "main.comparisons=[]", "training.steps=30", "online.every=3", "seed=44")


@pytest.fixture(scope="module", params=sorted(ONLINE))
def adapted(
    request: pytest.FixtureRequest,
    tiny: list[str],
    command: Command,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    overrides = [*tiny, *ADAPTS, f"mixture={request.param}", f"run_dir={run_dir}"]
    assert command(*overrides, "stage=plan").code == 0
    outcome = command(*overrides)
    assert outcome.code == 0, outcome
    return request.param, run_dir


@pytest.mark.slow
def test_weights_and_schedule_are_what_was_drawn(
    adapted: tuple[str, Path], tiny: list[str], command: Command
) -> None:
    name, run_dir = adapted
    trace, mixture = lines(run_dir / "main/domain_weights.jsonl"), read(run_dir / "weights.json")
    drawn = {domain: sum(line["tokens"][domain] for line in trace) for domain in mixture["weights"]}
    assert mixture["method"] == name and len(trace) == 30
    assert mixture["weights"] == pytest.approx(
        {domain: n / sum(drawn.values()) for domain, n in drawn.items()}
    )
    stages = mixture["schedule"]
    assert [first for first, _ in stages] == list(range(30))  # fewer steps than stages
    for (first, weights), line in zip(stages, trace, strict=True):
        assert weights == pytest.approx(
            {domain: n / (8 * 32) for domain, n in line["tokens"].items()}
        ), first
    for before, after in itertools.pairwise(trace):  # a line's weights are those of the next batch
        for domain, weight in before["weights"].items():
            assert abs(after["tokens"][domain] / 32 - 8 * weight) < 1
    assert "main" in read(run_dir / "plan.json")["stages"]
    overrides = [
        *tiny,
        *ADAPTS,
        f"mixture={name}",
        f"run_dir={run_dir}",
        "stage=export",
        "export.to=levanter",
    ]
    assert command(*overrides).code == 0
    exported = yaml.safe_load((run_dir / "export/mixture_levanter.yaml").read_text())["data"][
        "train_weights"
    ]
    # A stage of Levanter may begin every 2048 sequences, which are 256 steps: there is one.
    ((first, written),) = exported
    assert first == 0 and written == pytest.approx(mixture["weights"])
    if name == "dro":
        recipe = read(run_dir / "main/recipe.json")["options"]
        figures = read(run_dir / "reference/result.json")["evaluation"]["domains"]
        expected = [figures[domain]["loss"] for domain in mixture["weights"]]
        assert recipe["target_losses"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_stopped_it_continues_to_the_same_bits(
    adapted: tuple[str, Path],
    fresh: list[str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from doremi_train.storage.runs import stop

    name, run_dir = adapted
    really, calls = ONLINE[name].update, []

    def update(*arguments: Any) -> Any:
        calls.append(1)
        stop.requested = len(calls) == 14
        return really(*arguments)

    monkeypatch.setattr(ONLINE[name], "update", update)
    overrides = [*fresh, *ADAPTS, f"mixture={name}", f"run_dir={tmp_path / 'run'}"]
    assert command(*overrides).code == 75
    # Looked for before the update.
    assert len(lines(tmp_path / "run/main/domain_weights.jsonl")) == 15
    assert command(*overrides).code == 0
    for file in ("weights.json", "main/domain_weights.jsonl", "main/model/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (run_dir / file).read_bytes(), file


def test_rounding_does_not_choose_the_law_through_two_pieces() -> None:
    n, tokens = (
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.full((2, 3), 64.0, dtype=torch.float64),
    )
    losses = tokens * torch.tensor([[6.0, 5.0, 4.0], [5.9, 5.0, 4.1]], dtype=torch.float64)
    rounded = losses * (
        1 + 1e-7 * torch.tensor([[1.0, -1.0, 1.0], [-1.0, 0.0, 1.0]], dtype=torch.float64)
    )
    one, other = (ado.fit(n, found, tokens, 2.0) for found in (losses, rounded))
    torch.testing.assert_close(one.exponent, other.exponent, rtol=0, atol=0)
    torch.testing.assert_close(one.above, other.above, rtol=1e-4, atol=1e-4)


@pytest.mark.acceptance
def test_two_processes_draw_what_one_draws(
    adapted: tuple[str, Path], fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    name, run_dir = adapted
    outcome = doremi(*fresh, *ADAPTS, f"mixture={name}", f"run_dir={tmp_path / 'run'}", processes=2)
    assert outcome.code == 0, outcome.err
    for one, two in zip(
        *(lines(folder / "main/domain_weights.jsonl") for folder in (run_dir, tmp_path / "run")),
        strict=True,
    ):
        assert one["tokens"] == two["tokens"] and one["weights"] == pytest.approx(
            two["weights"], abs=1e-5
        )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["online.target_losses={plain: 2.0}"], "must name exactly digits, plain, rich"),
        (["online.prior=magic"], "online.prior=magic"),
        (["training.loss_weighting=rho"], "leave training.loss_weighting"),
        (["main.tokens=1000000000000"], "mixture.max_epochs=4"),
        (["online.floor=0.5"], "online.floor=0.5"),
    ],
)
def test_a_mistake_is_named(
    overrides: list[str], said: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    outcome = command(
        *tiny, *ADAPTS, "mixture=dro", "stage=plan", *overrides, f"run_dir={tmp_path / 'run'}"
    )
    assert outcome.code == 2 and said in outcome.err, outcome
