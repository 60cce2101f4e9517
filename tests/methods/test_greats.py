"""GREATS' greedy, and the selection of a batch's examples inside the training loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command import Command, Outcome
from helpers.corpus import documents, write_jsonl
from torch import Tensor
from torch.nn.functional import cross_entropy

from doremi_train.config import UserError
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.gradients import capture, directional, products
from doremi_train.methods import greats
from doremi_train.model import configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.training import batch_selection
from doremi_train.training.batch_selection import BatchSelectionOptions

# ── The greedy ──────────────────────────────────────────────────────────────────────


def naive(gain: Tensor, gram: Tensor, count: int, eta: float, curvature: float) -> list[int]:
    """The paper's lines, with the whole sum over all picks at every turn."""
    picked: list[int] = []
    for _ in range(count):
        best = max(
            (i for i in range(len(gain)) if i not in picked),
            key=lambda i: float(
                eta * gain[i] - sum(eta**2 * curvature * gram[i, j] for j in picked)
            ),
        )
        picked.append(best)
    return picked


def random_gradients(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return rows @ torch.randn(5, generator=generator, dtype=torch.float64), rows @ rows.T


@pytest.mark.parametrize("seed", range(5))
def test_the_correction_is_a_sum_over_all_picks(seed: int) -> None:
    gain, gram = random_gradients(seed=seed)
    found = greats.pick(gain, gram, 6, 0.3, 1.0, None)
    assert found.picked.tolist() == naive(gain, gram, 6, 0.3, 1.0)
    for n, i in enumerate(found.picked.tolist()):
        before = found.picked[:n]
        assert float(found.score[n]) == pytest.approx(0.3 * float(gain[i]))
        assert float(found.penalty[n]) == pytest.approx(0.09 * float(gram[i, before].sum()))


def test_without_curvature_it_is_first_order_top_k() -> None:
    gain, gram = random_gradients()
    one, two = greats.pick(gain, gram, 5, 1.0, 0.0, None), greats.top(gain, 5)
    assert one.picked.tolist() == two.picked.tolist() and one.ratio == 0


def test_what_has_no_gradient_or_is_not_finite_never_wins() -> None:
    gain, gram = random_gradients()
    gain[3] = torch.nan  # the mean over no token
    gram[3] = gram[:, 3] = torch.nan
    gram[7] = gram[:, 7] = gain[7] = 0.0  # all tokens masked
    gain[5] = torch.inf
    found = greats.pick(gain, gram, 12, 1.0, 1.0, None).picked.tolist()
    assert sorted(found) == [i for i in range(12) if i not in (3, 5, 7)]
    assert torch.isfinite(greats.pick(gain, gram, 12, 1.0, 1.0, 0.9).penalty).all()
    assert sorted(greats.top(gain, 12).picked.tolist()) == [i for i in range(12) if i not in (3, 5)]


def test_a_near_duplicate_is_refused_while_others_are_left() -> None:
    gain, gram = random_gradients(6)
    twice = torch.arange(6).repeat(2)
    gain, gram = gain[twice], gram[twice][:, twice]
    found = greats.pick(gain, gram, 6, 1e-6, 1.0, 0.95).picked
    assert len({int(i) % 6 for i in found}) == 6
    # Then they are all there is.
    assert len(greats.pick(gain, gram, 8, 1e-6, 1.0, 0.95).picked) == 8


def pairs_of_examples() -> tuple[Tensor, Tensor, float]:
    """gain (16,), gram (16, 16) and λ of eight examples and their exact duplicates, on a real
    model."""
    options = ModelOptions(**configs.preset("tiny", "model"))
    built = folders.build(configs.resolve(options, 300, 0, 32), 0)
    tokens = torch.randint(300, (16, 33), generator=torch.Generator().manual_seed(0))
    validation, tokens = tokens[8:], tokens[:8].repeat(2, 1)
    examples = capture.capture(built, lambda: built(tokens) / 32, (16, 32)).examples

    def of_validation() -> dict[str, Tensor]:
        named = dict(built.named_parameters())
        return dict(
            zip(
                named,
                torch.autograd.grad(built(validation).mean(), list(named.values())),
                strict=True,
            )
        )

    target = of_validation()
    square = sum(float(part.double().square().sum()) for part in target.values())
    found = products.products(examples, (target,))
    return (
        found.dots[:, 0],
        found.gram,
        directional.curvature(built, of_validation, target) / square,
    )


def test_as_published_the_second_term_is_inert_and_calibrated_with_the_cap_it_is_not() -> None:
    gain, gram, curvature = pairs_of_examples()

    def distinct(step_size: float, curvature: float, cap: float | None) -> int:
        return len(
            {int(i) % 8 for i in greats.pick(gain, gram, 8, step_size, curvature, cap).picked}
        )

    assert [distinct(rate, 1.0, None) for rate in (2e-5, 6e-4)] == [4, 4]  # every pick twice
    assert curvature > 0
    assert distinct(6e-4 / 8, curvature, 0.95) == 8


def test_the_validation_gradient_is_taken_at_each_of_the_first_steps_and_then_now_and_then() -> (
    None
):
    assert [step for step in range(1, 20) if batch_selection.looks_ahead(step, 5)] == [
        1,
        2,
        3,
        4,
        5,
        6,
        11,
        16,
    ]
    assert all(batch_selection.looks_ahead(step, 1) for step in range(1, 9))


# ── In the training loop ────────────────────────────────────────────────────────────

SELECTING = (
    "stage=main", "mixture=natural", "main.comparisons=[]", "training.batch_size=6",
    "batch_selection.candidates=14", "batch_selection.validation_sequences=6",
    "batch_selection.validation_every=4", "evaluation.sequences=2",
)  # fmt: skip


def lines(run_dir: Path, name: str = "batch_selection") -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (run_dir / "main" / f"{name}.jsonl").read_text().splitlines()
    ]


def same_picks(one: Path, two: Path) -> None:
    for a, b in zip(lines(one), lines(two), strict=True):
        assert (a["picked"], a["highest"]["sequence"]) == (b["picked"], b["highest"]["sequence"])
        assert a["highest"]["score"] == pytest.approx(b["highest"]["score"], rel=1e-3)
    for a, b in zip(lines(one, "metrics"), lines(two, "metrics"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


@pytest.fixture(scope="module")
def one_pass(tiny: list[str], command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("greats") / "run"
    outcome = command(*tiny, *SELECTING, f"run_dir={run_dir}", "batch_selection=greats")
    assert outcome.code == 0, outcome
    result = json.loads((run_dir / "main" / "result.json").read_text())
    assert "greats picks 6 of 14, one pass" in result["engine"]
    return run_dir


@pytest.mark.slow
def test_one_pass_trains_as_an_ordinary_step_on_the_picks_does(
    one_pass: Path, fresh: list[str], command: Command, tmp_path: Path
) -> None:
    run_dir = tmp_path / "two"  # with checkpointing the picks are run again, forward and backward
    more = [
        "batch_selection=greats",
        "training.activation_checkpointing=true",
        "batch_selection.verify=true",
    ]
    assert command(*fresh, *SELECTING, *more, f"run_dir={run_dir}").code == 0
    assert "two passes" in json.loads((run_dir / "main" / "result.json").read_text())["engine"]
    same_picks(one_pass, run_dir)


@pytest.mark.slow
def test_picks_do_not_depend_on_micro_batches(
    one_pass: Path, fresh: list[str], command: Command, tmp_path: Path
) -> None:
    more = [
        "batch_selection=greats",
        "training.micro_batch_size=3",
        f"run_dir={tmp_path / 'parts'}",
    ]
    assert command(*fresh, *SELECTING, *more).code == 0
    same_picks(one_pass, tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_pick_what_one_picks(
    one_pass: Path, fresh: list[str], doremi: Command, tmp_path: Path
) -> None:
    outcome = doremi(
        *fresh, *SELECTING, "batch_selection=greats", f"run_dir={tmp_path / 'two'}", processes=2
    )
    assert outcome.code == 0, outcome.err
    assert (
        "one pass" in json.loads((tmp_path / "two" / "main" / "result.json").read_text())["engine"]
    )
    same_picks(one_pass, tmp_path / "two")


def test_a_stopped_run_continues_with_the_same_bits(
    one_pass: Path,
    fresh: list[str],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = [*fresh, *SELECTING, "batch_selection=greats", f"run_dir={tmp_path / 'run'}"]
    really = greats.pick
    calls: list[int] = []

    def pick(*arguments: Any) -> greats.Picks:
        calls.append(1)
        from doremi_train.storage.runs import stop

        stop.requested = len(calls) == 6  # between two gradients of the validation loss
        return really(*arguments)

    monkeypatch.setattr(greats, "pick", pick)
    assert command(*overrides).code == 75
    assert len(lines(tmp_path / "run")) == 6
    assert command(*overrides).code == 0
    assert lines(tmp_path / "run") == lines(one_pass)
    assert [line["loss"] for line in lines(tmp_path / "run", "metrics")] == [
        line["loss"] for line in lines(one_pass, "metrics")
    ]


@pytest.mark.parametrize(
    "policy",
    [
        "greats_published",
        "topk",
        "max_loss",
        "grad_norm",
        "random",
        "greats batch_selection.route=exact",
        "grad_norm batch_selection.route=exact",
    ],
)
def test_every_policy_trains(
    policy: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    more = [f"batch_selection={policy.split()[0]}", *policy.split()[1:], "training.steps=4"]
    outcome = command(*tiny, *SELECTING, *more, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome
    for line in lines(tmp_path / "run"):
        assert sum(line["picked"].values()) == 6 and sum(line["candidates"].values()) == 14
        assert all(line["picked"][name] <= line["candidates"][name] for name in line["picked"])
        assert line["highest"]["score"] >= line["lowest"]["score"]


def test_the_report_shows_what_was_picked(
    one_pass: Path, tiny: list[str], command: Command
) -> None:
    more = ["batch_selection=greats", "stage=report", f"run_dir={one_pass}"]
    assert command(*tiny, *SELECTING, *more).code == 0
    page = (one_pass / "report.html").read_text()
    assert (
        "Which candidates were trained on" in page
        and "highest score, " in page
        and "lowest score, " in page
    )
    assert "Part of a domain" in page and "Second term of GREATS over the first" in page


def test_the_target_is_disjoint_from_what_is_evaluated(
    tiny: list[str], command: Command, tmp_path: Path
) -> None:
    outcome = command(
        *tiny,
        *SELECTING,
        "batch_selection=topk",
        "evaluation.sequences=1000",
        f"run_dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2
    assert (
        "lower evaluation.sequences" in outcome.err
        and "batch_selection.validation_sequences=6" in outcome.err
    )


def test_a_given_target_may_not_be_evaluated(
    tiny: list[str], command: Command, tmp_path: Path, corpus: Path
) -> None:
    def select(*texts: str) -> Outcome:
        target = write_jsonl(tmp_path / "target.jsonl", list(texts))
        given = [
            f"batch_selection.validation=[{target}]",
            "batch_selection=topk",
            "training.steps=2",
        ]
        return command(*tiny, *SELECTING, *given, f"run_dir={tmp_path / 'run'}")

    own = next(documents(9, "xyz", 50, 1)) * 5
    assert select(own).code == 0
    store = TokenStore.open((tmp_path / "run" / "prepare").resolve())
    text = store.tokenizer().decode(
        store.gather("validation", np.zeros(1, int), np.zeros(1, int), 32)[0].tolist()
    )
    outcome = select("x", text + own)  # one token further on than where it is evaluated
    assert outcome.code == 2 and "shares text with the reported evaluation" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch_selection.candidates=6", "must be more than training.batch_size=6"),
        ("batch_selection.domains=[nowhere]", "allowed: digits, plain, rich"),
        ("engine.compile=true", "without engine.compile"),
        (
            "batch_selection.route=exact training.micro_batch_size=2",
            "raise training.micro_batch_size",
        ),
        ("batch_selection.validation=[nothing.jsonl]", "nothing.jsonl"),
    ],
)
def test_a_mistake_is_named(
    override: str, said: str, tiny: list[str], command: Command, tmp_path: Path
) -> None:
    outcome = command(
        *tiny,
        *SELECTING,
        "batch_selection=greats",
        *override.split(),
        "seed=7",
        f"run_dir={tmp_path / 'run'}",
    )
    assert outcome.code == 2 and said in outcome.err, outcome


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2", "zero3"])
def test_engines_that_cut_the_model_are_refused_by_name(strategy: str) -> None:
    """No process has whole layers there, whose inputs scores are made of; picks at random need
    none."""
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    for method in ("greats", "topk", "grad_norm", "max_loss"):
        setting = batch_selection.Setting(BatchSelectionOptions(method=method), 8, tokens)
        with pytest.raises(UserError, match=f"batch_selection={method}.*use engine=ddp"):
            batch_selection.check(setting, 4, 1, strategy, compiled=False)
        batch_selection.check(setting, 4, 1, "ddp", compiled=False)
    batch_selection.check(
        batch_selection.Setting(BatchSelectionOptions(method="random"), 8, tokens),
        4,
        1,
        strategy,
        compiled=False,
    )


def test_scores_are_of_the_examples_own_mean_loss() -> None:
    """Oracle of what the loop scores by: ⟨g_i, g_val⟩ by autograd, one example at a time."""
    gain, gram, _ = pairs_of_examples()
    options = ModelOptions(**configs.preset("tiny", "model"))
    built = folders.build(configs.resolve(options, 300, 0, 32), 0)
    tokens = torch.randint(300, (16, 33), generator=torch.Generator().manual_seed(0))

    def gradient(rows: Tensor) -> Tensor:
        logits = built.inner(input_ids=rows[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        return torch.cat(
            [part.flatten() for part in torch.autograd.grad(loss, list(built.parameters()))]
        )

    rows = torch.stack([gradient(tokens[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(gain[:8].float(), rows @ gradient(tokens[8:]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gram[:8, :8].float(), rows @ rows.T, rtol=1e-4, atol=1e-5)
