"""Influence scores on real models against the most naive way in float64, and rows on disk that
processes share."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.command import environment
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad

from doremi_train.config import UserError
from doremi_train.gradients import factors
from doremi_train.methods import less
from doremi_train.methods.less import Options
from doremi_train.selection.examples import baselines, influence
from doremi_train.selection.examples.influence import Checkpoint, Coded
from doremi_train.selection.examples.rows import Rows, cosines, stored

V = 13


class Losses(nn.Module):
    """(n, T + 1) → (n, T), in the model's own dtype; 0 for targets below 0, which are
    complements."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        ids = torch.where(tokens < 0, ~tokens, tokens)
        found = F.cross_entropy(
            self.inner(input_ids=ids[:, :-1]).logits.mT, ids[:, 1:], reduction="none"
        )
        return found.masked_fill(tokens[:, 1:] < 0, 0.0)


def build(lora: bool, tied: bool = False) -> Losses:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=V, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=None, use_cache=False, tie_word_embeddings=tied,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    if lora:
        peft = pytest.importorskip("peft")
        options = peft.LoraConfig(
            r=3, lora_alpha=7, lora_dropout=0.3, target_modules=["q_proj", "v_proj"]
        )
        model = peft.get_peft_model(model, options).double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.5)
    return Losses(model)


def examples(count: int, seed: int = 0) -> list[Coded]:
    """Of 4 to 9 tokens, of which the last ones carry a loss."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(random.integers(4, 10))
        ids = random.integers(0, V, length, dtype=np.int32)
        found.append(np.where(np.arange(length) >= random.integers(1, length - 1), ids, ~ids))
    return found


def trained(lora: bool, tied: bool = False) -> tuple[Checkpoint, torch.optim.AdamW]:
    """A model after three steps of AdamW, as at the end of an epoch."""
    model = build(lora, tied)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95)
    )
    for step in range(3):
        for _, batch in influence.batches(examples(4, 100 + step), 1000, torch.device("cpu")):
            influence.losses(model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return Checkpoint(model.eval(), influence.moments(model, optimizer)), optimizer


def gradient(model: nn.Module, example: Coded) -> dict[str, Tensor]:
    """Of the mean loss of one example, alone and unpadded."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tokens = torch.from_numpy(np.where(example < 0, ~example, example)).long()[None]

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (tokens,))[0][
            torch.from_numpy(example)[1:] >= 0
        ].mean()

    return grad(loss)(parameters)


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def all_of(found: list[Coded], tokens: int = 40) -> list[tuple[list[int], Tensor]]:
    return list(influence.batches(found, tokens, torch.device("cpu")))


CASES = [(False, False), (False, True), (True, False)]


@pytest.mark.parametrize(("lora", "tied"), CASES, ids=["full", "tied", "LoRA"])
@pytest.mark.parametrize(
    "options", [Options(), Options(cosine="mean"), Options("inside", False, "mean")], ids=str
)
def test_direct_scores_are_those_of_one_example_at_a_time(
    lora: bool, tied: bool, options: Options
) -> None:
    at, _ = trained(lora, tied)
    pool, subtasks = examples(7), [examples(1, 1), examples(3, 2)]
    plain = [torch.stack([flat(gradient(at.model, e)) for e in subtask]) for subtask in subtasks]
    moments = {name: at.moments[name] for name in sorted(at.moments)}
    expected = torch.empty(len(pool), 2, dtype=torch.float64)
    for row, example in enumerate(pool):
        own = gradient(at.model, example)
        direction = torch.cat(
            [less.direction(own[n], moments[n], options).flatten() for n in moments]
        )
        for column, found in enumerate(plain):
            cosine = torch.cosine_similarity(
                found if options.cosine == "mean" else found.mean(0)[None], direction[None]
            )
            expected[row, column] = cosine.mean()
    targets = [
        influence.target(at.model, [batch for _, batch in all_of(s)], options) for s in subtasks
    ]
    found = torch.empty_like(expected)
    for numbers, batch in all_of(pool):
        found[numbers] = influence.cosines(at, batch, targets, options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_projected_feature_is_the_projection_of_the_whole_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at, _ = trained(lora=False)
    pool = examples(6)
    whole = torch.zeros(6, 32, dtype=torch.float64)
    for row, example in enumerate(pool):
        own = gradient(at.model, example)
        whole[row] = influence.feature(
            {n: less.direction(g, at.moments[n], Options()) for n, g in own.items()}, 32, 0
        )
    for block in (1 << 22, 50):  # one example at a time or all, and rows in pieces
        monkeypatch.setattr(factors, "NUMBERS", block)
        for tokens in (1, 1000):
            found = torch.empty_like(whole)
            for numbers, batch in all_of(pool, tokens):
                found[numbers] = influence.features(at, batch, 32, 0, Options())
            torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2e-3), ("int8", 2e-2)])
def test_cosines_of_stored_features_are_close_to_the_exact_ones(
    kind: Any, tolerance: float
) -> None:
    """The projection as wide as this small model: what is left is its own error and that of the
    rounding."""
    at, _ = trained(lora=False)
    (numbers, batch), pool = all_of(examples(12), 10_000)[0], 12
    target = influence.target(at.model, [b for _, b in all_of(examples(3, 2))], Options())
    size = 1 << 14
    rows = influence.features(at, batch, size, 0, Options()).numpy()
    met = influence.feature(target, size, 0).numpy()[None]
    exact = influence.cosines(at, batch, [target], Options()).numpy()
    found = cosines(stored(rows, kind), met)
    unrounded = cosines(rows, met)
    assert len(numbers) == pool and np.abs(found - unrounded).max() < tolerance / 4
    assert np.abs(found - exact).max() < tolerance + 4 / size**0.5


def test_moments_are_adamw_s_by_name_and_only_its() -> None:
    at, optimizer = trained(lora=True)
    named = dict(at.model.named_parameters())
    for name, moments in at.moments.items():
        assert "lora_" in name and moments.step == 3 and moments.betas == (0.9, 0.95)
        assert torch.equal(moments.first, optimizer.state[named[name]]["exp_avg"])
    assert len(at.moments) == sum(p.requires_grad for p in named.values())
    with pytest.raises(TypeError, match="AdamW.*Adafactor"):
        influence.moments(
            at.model, torch.optim.Adafactor([p for p in named.values() if p.requires_grad])
        )


def test_batches_hold_each_example_once_and_stay_within_bounds() -> None:
    pool = examples(20)
    found = all_of(pool, 30)
    assert sorted(number for numbers, _ in found for number in numbers) == list(range(20))
    assert all(batch.numel() <= 30 for _, batch in found)
    for numbers, batch in found:
        assert (batch[:, 1:] >= 0).sum(1).tolist() == [int((pool[n] >= 0).sum()) for n in numbers]
    assert len(all_of(pool, 1)) == 20


# Baselines


def test_representations_are_of_an_example_alone() -> None:
    """The last token's, and the mean that weighs the n-th token n times; padding changes
    nothing."""
    inner: Any = build(lora=False).inner
    pool = examples(6)
    found = baselines.representations(inner, pool, 1000, torch.device("cpu"))
    for row, example in enumerate(pool):
        ids = torch.from_numpy(np.where(example < 0, ~example, example)).long()[None]
        with torch.no_grad():
            hidden = inner.base_model(input_ids=ids).last_hidden_state[0].float()
        weights = torch.arange(1.0, len(example) + 1)[:, None]
        for name, expected in (("rds", hidden[-1]), ("rds_plus", (weights * hidden).sum(0))):
            torch.testing.assert_close(
                found[name][row], expected / expected.norm(), rtol=1e-5, atol=1e-6
            )


def test_examples_of_the_target_take_turns() -> None:
    cosines = np.array([[0.9, 0.8], [0.8, 0.9], [0.7, 0.1], [0.1, 0.2]])
    assert baselines.round_robin(cosines, 4) == [0, 1, 2, 3]
    assert baselines.round_robin(cosines[::-1], 3) == [3, 2, 1]
    assert baselines.round_robin(cosines, 9) == [0, 1, 2, 3]


def test_resampling_favours_high_scores_and_follows_its_seed() -> None:
    scores = np.linspace(0, 1, 1000)
    picks = [np.argsort(-baselines.resampled(scores, seed))[:100] for seed in (0, 0, 1)]
    assert np.array_equal(picks[0], picks[1]) and not np.array_equal(picks[0], picks[2])
    assert 800 < picks[0].mean() < 950  # of the best hundred it would be 949.5


# Rows on disk


def numbers(rows: slice) -> NDArray[np.float64]:
    return np.arange(rows.start, rows.stop, dtype=np.float64)[:, None] * np.ones(3)


def opened(folder: Path, **other: Any) -> Rows:
    given = {
        "recipe": {"model": "a"},
        "count": 10,
        "width": 3,
        "kind": "float64",
        "per_shard": 4,
    } | other
    return Rows(folder, **given)


def read(rows: Rows) -> NDArray[Any]:
    return np.concatenate([rows.read(n) for n in range(rows.shards)])


def test_rows_are_mapped_and_computed_once(tmp_path: Path) -> None:
    rows, told = opened(tmp_path), list[int]()
    rows.fill(numbers, 1, told.append)
    assert told == [4, 6, 10]  # began with the second shard, of rows 4 … 7; the third has two
    assert np.array_equal(read(rows), numbers(slice(0, 10)))
    assert isinstance(rows.read(0), np.memmap)

    def never(rows: slice) -> NDArray[np.float64]:
        raise AssertionError

    opened(tmp_path).fill(never, 0, told.append)
    missing = next(tmp_path.glob("shard-00001*.npy"))
    content = missing.read_bytes()
    missing.unlink()
    asked: list[slice] = []
    opened(tmp_path).fill(lambda rows: asked.append(rows) or numbers(rows), 0, told.append)  # type: ignore[func-returns-value]
    assert asked == [slice(4, 8)] and missing.read_bytes() == content


def test_rows_of_something_else_are_refused(tmp_path: Path) -> None:
    opened(tmp_path / "a").fill(numbers, 0, lambda done: None)
    for other in ({"recipe": {"model": "b"}}, {"width": 4}, {"kind": "int8"}, {"count": 11}):
        with pytest.raises(UserError, match="other examples, models or settings"):
            opened(tmp_path / "a", **other)
    opened(tmp_path / "b", recipe={"model": "b"})
    shard = next((tmp_path / "a").glob("shard-00001*.npy"))
    (tmp_path / "b" / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match=shard.name):
        opened(tmp_path / "b", recipe={"model": "b"})
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match="torn"):
        read(opened(tmp_path / "a"))


FILL = """
import sys
from pathlib import Path
import numpy as np
from doremi_train.selection.examples.rows import Rows

def compute(rows):
    print(rows.start, flush=True)
    return np.arange(rows.start, rows.stop, dtype=np.float64)[:, None] * np.ones(3)

Rows(Path(sys.argv[1]), {"model": "a"}, 400, 3, "float64", 4).fill(compute, 0, lambda done: None)
"""


def test_processes_share_the_shards_of_one_folder(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted(map(int, told[0] + told[1])) == list(range(0, 400, 4))
    assert np.array_equal(read(opened(tmp_path, count=400)), numbers(slice(0, 400)))
    assert json.loads((tmp_path / "rows.json").read_text())["recipe"] == {"model": "a"}
