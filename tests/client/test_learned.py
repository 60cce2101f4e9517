"""Mixtures that follow from losses: those of the methods themselves, with a lag that is known, and
the same after a stop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from doremi_train.client import Stream
from doremi_train.client.learned import Learner, restored, save
from doremi_train.config import UserError
from doremi_train.methods import ONLINE, doremi
from doremi_train.methods.online import Stats

SIZES = {"a": 900, "b": 300, "c": 1200}
BATCH, STEPS, TOKENS = 10, 60, 5
TARGETS = {"a": 0.1, "b": 0.2, "c": 0.3}


def options(method: str) -> dict[str, Any]:
    return {"target_losses": TARGETS} if method == "dro" else {}


def losses() -> Iterator[Tensor]:
    """(K,) nats per token of every step."""
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        yield torch.from_numpy(np.array([3.0, 2.0, 1.0]) / (1 + step) ** 0.3 + rng.random(3) / 9)


def run(
    stream: Stream, learner: Learner, first: int = 0, last: int = STEPS, saved: tuple[int, ...] = ()
) -> list[list[int]]:
    """Sequences of each domain (K,) in every step of a loop that draws and reports."""
    drawn = []
    for step, loss in enumerate(losses()):
        if first <= step < last:
            counts = np.bincount(stream.draw(step).domain, minlength=len(SIZES))
            tokens = torch.from_numpy(counts * TOKENS).double()
            learner.report(loss * tokens, tokens)
            drawn.append(counts.tolist())
            if step + 1 in saved:
                learner.save()
    return drawn


@pytest.mark.parametrize("method", [*ONLINE])
def test_without_a_lag_it_is_the_method_step_by_step(method: str, tmp_path: Path) -> None:
    stream = Stream(SIZES, BATCH, None, tmp_path, every=1)
    learner = Learner(stream, method, STEPS, **options(method))
    found = run(stream, learner)
    rules = ONLINE[method]
    targets = {"target_losses": tuple(TARGETS.values())} if method == "dro" else {}
    given = rules.Options(prior=(1 / 3,) * 3, high=(1.0,) * 3, **targets)
    state, moved = rules.init(3, STEPS, given), False
    for step, loss in enumerate(losses()):
        weights = rules.sampling(state, given).numpy()
        assert (stream.weights(step) == weights).all()  # bit for bit
        moved = moved or bool(abs(weights - 1 / 3).max() > 0.01)
        tokens = torch.tensor(found[step]).double() * TOKENS
        state = rules.update(state, Stats(loss * tokens, tokens), given)
    assert moved


def test_a_block_is_what_was_known_so_many_steps_before(tmp_path: Path) -> None:
    exact = Stream(SIZES, BATCH, None, tmp_path / "exact", every=1)
    known = Learner(exact, "odm", STEPS)
    late = Stream(SIZES, BATCH, None, tmp_path / "late", every=4)
    learner = Learner(late, "odm", STEPS, lag=6)
    weights = []
    for loss in losses():
        weights.append(known.weights.numpy())
        tokens = torch.full((3,), 10.0, dtype=torch.float64)
        for one in (known, learner):
            one.report(loss * tokens, tokens)
        # What a loader may ask for by now: six steps ahead.
        late.draw(known.step + 6)
    for step in range(STEPS):
        wanted = weights[max(step // 4 * 4 - 6, 0)]
        assert (late.weights(step) == wanted).all()


@pytest.mark.parametrize("method", [*ONLINE])
def test_a_stopped_run_goes_on_as_it_would_have(method: str, tmp_path: Path) -> None:
    more = options(method) | {"prior": {"a": 0.2, "b": 0.3, "c": 0.5}, "max_epochs": 3}
    of = Stream(SIZES, BATCH, None, tmp_path / "whole", every=5)
    whole = run(of, Learner(of, method, STEPS, lag=2, **more))
    of = Stream(SIZES, BATCH, None, tmp_path / "stopped", every=5)
    begun = run(of, Learner(of, method, STEPS, lag=2, **more), last=37, saved=(20,))
    of = Stream(SIZES, BATCH, None, tmp_path / "stopped", every=5)
    learner = Learner(of, method, STEPS, lag=2, **more)
    learner.restore(20)
    assert begun[:20] + run(of, learner, first=20) == whole
    with pytest.raises(UserError, match="continue from a step that was saved"):
        learner.restore(21)


def test_no_domain_passes_its_epochs(tmp_path: Path) -> None:
    of = Stream({"a": 20, "b": 400, "c": 400}, BATCH, None, tmp_path, every=1)
    run(of, Learner(of, "odm", STEPS, max_epochs=2))
    assert of.draw(STEPS - 1).counts[0] <= 2 * 20 + 1


def test_a_state_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    given = doremi.Options(step_size="auto", warmup="auto", settled=0.1)
    state = doremi.init(3, 40, given)
    generator = torch.Generator().manual_seed(0)
    for _ in range(31):
        drawn = torch.rand(3, generator=generator, dtype=torch.float64)
        state = doremi.update(state, doremi.Stats(drawn, torch.ones_like(drawn)), given)
    save(tmp_path / "state.json", state)
    found = restored(tmp_path / "state.json", doremi.init(3, 40, given))
    for a, b in zip(state, found, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("adamw", {}, r"method='adamw': unknown; allowed: ado, odm, dro"),
        ("odm", {"step_size": 1.0}, "step_size"),
        ("odm", {"floor": 2.0}, "floor"),
        ("odm", {"prior": {"a": 1.0}}, "prior: no weight for b, c"),
    ],
)
def test_what_it_cannot_be_is_refused(
    method: str, more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        Learner(Stream(SIZES, BATCH, None, tmp_path), method, STEPS, **more)


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (1.0, 0.0)])
def test_losses_that_say_nothing_end_it(bad: tuple[float, float], tmp_path: Path) -> None:
    learner = Learner(Stream(SIZES, BATCH, None, tmp_path), "odm", STEPS)
    loss, tokens = (torch.tensor([x, x, x], dtype=torch.float64) for x in bad)
    with pytest.raises(ValueError, match=r"step 1: .* look for what broke"):
        learner.report(loss, tokens)
