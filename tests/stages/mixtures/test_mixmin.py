"""MixMin against a general solver, in float64, and as a mixture of experts that are ordinary
runs."""

from pathlib import Path

import numpy as np
import pytest
from helpers.command import Command
from helpers.corpus import documents, write_jsonl
from helpers.processes import read
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import optimize

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods import mixmin
from doremi_train.methods.box import Box, Floats

K, N = 4, 300
FREE = Box(np.zeros(K), np.ones(K))


def experts(seed: int) -> Floats:
    """(K, N) losses: each expert is good at tokens of its own, and some are alike."""
    random = np.random.default_rng(seed)
    kinds = random.integers(K, size=N)
    return random.gamma(3.0, 1.0, (K, N)) * np.where(kinds == np.arange(K)[:, None], 0.3, 1.0)


def by_slsqp(losses: Floats, within: Box) -> Floats:
    """The objective of the paper, by a general solver."""
    start = np.clip(np.full(K, 1 / K), *within)
    found = optimize.minimize(
        lambda p: -np.log(p @ np.exp(-losses)).mean(),
        start / start.sum(),
        bounds=list(zip(*within, strict=True)),
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.floats(0.3, 1.0), st.floats(0, 0.1))
def test_it_is_the_minimum_within_caps_and_floors(seed: int, cap: float, floor: float) -> None:
    losses, within = experts(seed), Box(np.full(K, floor), np.full(K, cap))
    found = mixmin.solve(losses, within)
    assert found.weights.sum() == pytest.approx(1) and (found.weights >= floor - 1e-12).all()
    assert (found.weights <= cap + 1e-12).all()
    assert found.loss == pytest.approx(-np.log(found.weights @ np.exp(-losses)).mean(), abs=1e-12)
    assert found.loss <= mixmin.mixed(losses, by_slsqp(losses, within)) + 1e-9


@pytest.mark.slow
def test_the_true_mixture_of_a_target_is_found() -> None:
    """Tokens drawn from a known mixture of known distributions."""
    random, true = np.random.default_rng(0), np.array([0.5, 0.3, 0.2, 0.0])
    laws = random.dirichlet(np.full(50, 0.2), K) * 0.99 + 0.01 / 50
    tokens = random.choice(50, 8000, p=true @ laws)
    assert_allclose(mixmin.solve(-np.log(laws[:, tokens]), FREE).weights, true, atol=0.04)


def test_equal_experts_keep_equal_weights_and_large_losses_do_no_harm() -> None:
    losses = experts(1)
    losses[1] = losses[0]
    found = mixmin.solve(losses, FREE).weights
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert_allclose(mixmin.solve(losses + 5000.0, FREE).weights, found, atol=1e-9)


# ── The experts ─────────────────────────────────────────────────────────────────────

MIXMIN = (
    "mixture=mixmin",
    "stage=main",
    "main.comparisons=[]",
    "seed=55",
    "training.steps=20",
    "target.sequences=9",
)


@pytest.fixture(scope="module")
def solved(tiny: list[str], command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixmin")
    target = write_jsonl(folder / "target.jsonl", list(documents(7, "0123456789", 200, 20_000)))
    overrides = [*tiny, *MIXMIN, f"target.files=[{target}]", f"run_dir={folder / 'run'}"]
    assert command(*overrides, "stage=plan").code == 0
    outcome = command(*overrides)
    assert outcome.code == 0 and "mixmin: the mixed experts reach" in outcome.out, outcome
    return folder / "run"


@pytest.mark.slow
def test_the_target_s_own_domain_wins(solved: Path) -> None:
    mixture, plan = read(solved / "weights.json"), read(solved / "plan.json")
    assert (
        mixture["method"] == "mixmin"
        and max(mixture["weights"], key=mixture["weights"].get) == "digits"
    )
    known = mixture["provenance"]
    assert known["experts_loss"] <= min(
        known["experts_loss_natural"], known["experts_loss_uniform"]
    )
    assert known["experts_loss"] <= min(known["expert_losses"].values()) + 1e-9
    assert all(epochs <= 4 * (1 + 1e-9) for epochs in mixture["epochs"].values())
    assert {f"mixmin/experts/{name}" for name in mixture["weights"]} <= set(plan["stages"])


def test_an_expert_depends_on_its_domain_alone(solved: Path) -> None:
    store = TokenStore.open((solved / "prepare").resolve())
    only = store.only(["plain"])
    assert only.domains == ("plain",) and only.fingerprint != store.fingerprint
    k = store.domains.index("plain")
    for split in ("train", "validation"):
        assert only.sequences(split, 32)[0] == store.sequences(split, 32)[k]
        at = np.arange(3)
        found = only.gather(split, np.zeros(3, int), at, 32)
        assert np.array_equal(found, store.gather(split, np.full(3, k), at, 32))
    assert read(solved / "mixmin/experts/plain/recipe.json")["mixture"] == {"plain": 1.0}


@pytest.mark.slow
def test_a_new_domain_costs_one_run(
    solved: Path, corpus: Path, tiny: list[str], store: Path, command: Command, tmp_path: Path
) -> None:
    given = [
        f"data.tokenizer={solved / 'prepare/tokenizer.json'}",
        "target.domains=[digits]",
        "target.sequences=2",
    ]
    for name in ("digits", "plain", "rich"):
        (tmp_path / "more" / name).mkdir(parents=True)
        (tmp_path / "more" / name / "train.jsonl").symlink_to(corpus / name / "train.jsonl")
    overrides = [
        *tiny,
        *MIXMIN,
        *given,
        f"data.root={tmp_path / 'more'}",
        "stage=export",
        "export.to=levanter",
    ]
    assert command(*overrides, f"run_dir={tmp_path / 'before'}").code == 0
    before = set(store.glob("runs/language_model-*"))
    write_jsonl(tmp_path / "more/new/train.jsonl", list(documents(9, "uvwxyz", 80, 50_000)))
    outcome = command(*overrides, f"run_dir={tmp_path / 'after'}")
    assert outcome.code == 0, outcome
    assert len(set(store.glob("runs/language_model-*")) - before) == 1
    assert set(read(tmp_path / "after/weights.json")["weights"]) == {
        "digits",
        "new",
        "plain",
        "rich",
    }


def test_some_of_the_domains_take_part_and_nothing_is_prepared_anew(
    solved: Path, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    overrides = [
        *tiny,
        "mixture=natural",
        "main.comparisons=[]",
        "training.steps=4",
        f"run_dir={tmp_path / 'run'}",
    ]
    outcome = command(*overrides, "data.only=[rich,plain]")
    assert outcome.code == 0, outcome
    assert set(read(tmp_path / "run/weights.json")["weights"]) == {"plain", "rich"}
    assert set(read(tmp_path / "run/evaluation.json")["main"]["domains"]) == {"plain", "rich"}
    assert (tmp_path / "run/prepare").resolve() == (solved / "prepare").resolve()
    wrong = command(*overrides[:-1], f"run_dir={tmp_path / 'wrong'}", "data.only=[prose]")
    assert (
        wrong.code == 2 and "data.only=[prose]" in wrong.err and "digits, plain, rich" in wrong.err
    ), wrong


@pytest.mark.acceptance
def test_experts_as_jobs_are_those_of_one_process(
    solved: Path, fresh: list[str], command: Command, tmp_path: Path
) -> None:
    target = solved.parent / "target.jsonl"
    overrides = [
        *fresh,
        *MIXMIN,
        f"target.files=[{target}]",
        f"run_dir={tmp_path / 'run'}",
        "submit.cluster=local",
    ]
    outcome = command(*overrides)
    assert outcome.code == 0 and outcome.out.count("is job") == 3, outcome
    assert (tmp_path / "run/weights.json").read_bytes() == (solved / "weights.json").read_bytes()
