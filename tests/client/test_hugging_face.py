"""A transformers Trainer that draws from our stream, learns an online mixture, and is DoReMi's
proxy: the draws and the α of our own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import hugging_face as run
from helpers import pretrained
from helpers.command import environment
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    default_data_collator,
)
from transformers.modeling_outputs import CausalLMOutput

from doremi_train.client import Mixed, Stream
from doremi_train.client.hugging_face import DomainLosses, Proxy, shifted
from doremi_train.client.learned import Learner
from doremi_train.client.proxy import Reweighting
from doremi_train.config import UserError
from doremi_train.methods import doremi

UNIFORM = dict.fromkeys(run.NAMES, 1 / 3)
STEPS = 12


class Seen(TrainerCallback):
    """The rows that a model was given."""

    def __init__(self, trainer: Any) -> None:
        self.rows: list[list[int]] = []
        trainer.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.rows += kwargs["input_ids"].tolist()


def wanted(stream: Any, steps: int) -> list[list[int]]:
    domains = [*run.domains().values()]
    return [
        domains[domain][sequence].tolist()
        for step in range(steps)
        for domain, sequence in zip(*stream.draw(step)[:2], strict=True)
    ]


@pytest.mark.parametrize("more", [{}, {"dataloader_num_workers": 2}], ids=["plain", "workers"])
def test_it_trains_on_what_the_stream_draws(more: dict[str, Any], tmp_path: Path) -> None:
    """Two micro-batches a step, and a mixture that changes while it runs."""
    file = tmp_path / "mixture.json"
    file.write_text(json.dumps(UNIFORM))
    stream = run.stream(tmp_path, file)
    trainer = run.trainer(tmp_path, stream, STEPS, 4, gradient_accumulation_steps=2, **more)
    seen = Seen(trainer)
    losses = DomainLosses(trainer)

    class Change(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                file.write_text(json.dumps(UNIFORM | {"same": 0.0, "noise": 2 / 3}))

    trainer.add_callback(Change())
    trainer.train()
    assert seen.rows == wanted(stream, STEPS)
    assert stream.weights(0).tolist() == [1 / 3] * 3 and stream.weights(11)[0] == 0
    # The mean over domains, weighed by their tokens, is the Trainer's own loss, which counts the
    # first token of a sequence too, though it has none.
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for step, line in enumerate(lines):
        counts = np.bincount(stream.draw(step).domain, minlength=3)
        mean = sum(line.get(f"loss/{n}", 0) * c for n, c in zip(run.NAMES, counts, strict=True))
        part = (run.LENGTH - 1) / run.LENGTH
        assert mean / counts.sum() * part == pytest.approx(line["loss"], abs=1e-4)
    assert losses.stream is stream


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    """With a mixture that follows from losses, stopped between two changes."""

    def train(folder: Path, last: int, **more: Any) -> Any:
        stream = run.stream(folder, None)
        trainer = run.trainer(folder, stream, STEPS, save_strategy="steps", save_steps=6)
        DomainLosses(trainer, Learner(stream, "odm", STEPS, lag=2))

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = state.global_step >= last

        trainer.add_callback(Stop())
        trainer.train(**more)
        return trainer, stream

    whole, stream = train(tmp_path / "whole", STEPS)
    train(tmp_path / "stopped", 9)
    again, other = train(tmp_path / "stopped", STEPS, resume_from_checkpoint=True)
    assert abs(stream.weights(8) - 1 / 3).max() > 0.005
    assert all((stream.weights(s) == other.weights(s)).all() for s in range(STEPS))
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all((a == b).all() for a, b in pairs)
    assert whole.state.log_history[:STEPS][-1]["loss"] == again.state.log_history[-2]["loss"]


def oracle(
    stream: Any, steps: int, options: doremi.Options, lagged: bool = False
) -> list[dict[str, Any]]:
    """α_t of Algorithm 1 in a loop of its own, with the Trainer's optimiser."""
    model, reference = run.model(0), run.model(1).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    rows, state = wanted(stream, steps), doremi.init(3, steps, options)
    lines = []
    for step in range(steps):
        tokens = torch.tensor(rows[step * run.BATCH : (step + 1) * run.BATCH])
        domain = torch.from_numpy(stream.draw(step).domain)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / steps)
        losses, _ = shifted(model(input_ids=tokens).logits, tokens)
        with torch.no_grad():
            held, _ = shifted(reference(input_ids=tokens).logits, tokens)
        stats = doremi.observe(losses, held, domain, 3, options)
        before, state = state, doremi.update(state, stats, options)
        weights = doremi.weigh(before if lagged else state, domain, stats.tokens, options)
        optimizer.zero_grad()
        (weights * losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lines.append(doremi.record(state, stats))
    return lines


@pytest.mark.parametrize("micro", [1, 2], ids=["exact", "lagged"])
def test_a_proxy_has_the_weights_of_algorithm_1(micro: int, tmp_path: Path) -> None:
    stream, options = run.stream(tmp_path, UNIFORM), doremi.Options(step_size=0.5)
    more = {"gradient_accumulation_steps": micro}
    trainer = run.trainer(tmp_path, stream, STEPS, run.BATCH // micro, **more)
    Proxy(trainer, run.model(1), STEPS, options)
    trainer.train()
    trace = [
        json.loads(line) for line in (stream.folder / "domain_weights.jsonl").read_text().split()
    ]
    lines = oracle(stream, STEPS, options, lagged=micro > 1)
    assert len(trace) == STEPS
    for found, line in zip(trace, lines, strict=True):
        assert [*found["weights"].values()] == pytest.approx(line["weights"].tolist(), abs=1e-6)
        assert [*found["tokens"].values()] == line["tokens"].tolist()
    weights = json.loads((stream.folder / "weights.json").read_text())["weights"]
    mean = torch.stack([line["weights"] for line in lines]).mean(0)
    assert [*weights.values()] == pytest.approx(mean.tolist(), abs=1e-6)
    assert max(weights.values()) - min(weights.values()) > 0.05


def test_padding_is_no_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 0, 1]])
    losses, present = shifted(logits, labels)
    assert present.tolist() == [[True, True, False, False], [True] * 4]
    assert (losses[~present] == 0).all() and (losses[present] > 0).all()
    logs = logits[:, :-1].log_softmax(-1)
    assert losses[1, 2].item() == pytest.approx(-logs[1, 2, 0].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train_sampling_strategy": "random"}, "would shuffle .* set sequential"),
        ({"remove_unused_columns": True}, "would take `domain` out of every batch.* set False"),
        ({"per_device_train_batch_size": 4}, "a step reads 4 sequences, the stream's has 8"),
        ({"dataloader_num_workers": 3}, r"lag=2: the loader reads 8 steps ahead; set lag=8"),
    ],
)
def test_a_trainer_that_would_read_something_else_is_refused(
    more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    stream = run.stream(tmp_path, None)
    trainer = run.trainer(tmp_path, stream, STEPS, **more)
    DomainLosses(trainer, Learner(stream, "odm", STEPS, lag=2))
    with pytest.raises(UserError, match=said):
        trainer.train()


def test_a_model_without_logits_is_refused(tmp_path: Path) -> None:
    trainer = run.trainer(tmp_path, run.stream(tmp_path, UNIFORM), STEPS)
    assert trainer.model is not None
    trainer.model.register_forward_hook(lambda *_: CausalLMOutput(loss=torch.zeros(())))
    DomainLosses(trainer)
    with pytest.raises(UserError, match=r"gives a CausalLMOutput without logits.* Mixed alone"):
        trainer.train()


def test_a_proxy_that_accumulates_knows_a_batch_by_what_is_drawn(tmp_path: Path) -> None:
    reweighting = Reweighting(run.stream(tmp_path, UNIFORM), STEPS, micro_batches=2)
    losses, present = torch.ones(2, 3), torch.tensor([[True] * 3, [True, True, False]])
    reweighting.begin()
    with pytest.raises(UserError, match="a label is ignored.* take the batch at once, or pack"):
        reweighting.objective(losses, losses, present, torch.tensor([0, 1]))


def fused(of: Stream, folder: Path) -> Any:
    """TRL's SFTTrainer, whose model gives no logits, over a `Mixed`."""
    trl = pytest.importorskip("trl", reason="pip install --no-deps trl")
    words = models.WordLevel({f"t{n}": n for n in range(run.VOCABULARY)}, unk_token="t0")
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="t0", eos_token="t1"
    )
    said = run.arguments(folder, STEPS, run.BATCH).to_dict()
    keys = ("max_steps", "per_device_train_batch_size", "train_sampling_strategy", "learning_rate")
    more = {key: said[key] for key in (*keys, "remove_unused_columns", "output_dir", "use_cpu")}
    arguments = trl.SFTConfig(
        **more, logging_steps=1, save_strategy="no", report_to=[], max_length=None, bf16=False
    )
    rows = {
        name: [{"input_ids": r, "labels": r, "attention_mask": np.ones_like(r)} for r in each]
        for name, each in run.domains().items()
    }
    first = Dataset.from_dict({"input_ids": [[1, 2]]})  # it takes no other when it is made
    trainer = trl.SFTTrainer(
        run.model(0),
        arguments,
        train_dataset=first,
        processing_class=tokens,
        data_collator=default_data_collator,
    )
    trainer.train_dataset = Mixed(rows, of, STEPS)
    return trainer


@pytest.mark.acceptance
def test_a_fused_loss_of_trl_is_known_by_domain(tmp_path: Path) -> None:
    of = run.stream(tmp_path, None)
    trainer = fused(of, tmp_path)
    seen = Seen(trainer)
    DomainLosses(trainer, Learner(of, "odm", STEPS, lag=2))
    trainer.train()
    assert seen.rows == wanted(of, STEPS)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == STEPS
    for step, line in enumerate(lines):
        quota = of.quota(step)
        mean = sum(line.get(f"loss/{n}", 0) * q for n, q in zip(run.NAMES, quota, strict=True))
        part = (run.LENGTH - 1) / run.LENGTH  # it counts the first token too
        assert mean / run.BATCH == pytest.approx(line["loss"] / part, abs=1e-4)
    assert abs(of.weights(STEPS - 1) - 1 / 3).max() > 0.005


@pytest.mark.acceptance
def test_a_fused_loss_of_trl_cannot_be_weighed(tmp_path: Path) -> None:
    trainer = fused(run.stream(tmp_path, UNIFORM), tmp_path)
    Proxy(trainer, run.model(1), STEPS)
    with pytest.raises(UserError, match="without logits, .*use transformers' own Trainer"):
        trainer.train()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    script, alone, two = str(Path(run.__file__)), tmp_path / "one", tmp_path / "two"
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for folder, start, size in ((alone, [], run.BATCH), (two, several, run.BATCH // 2)):
        command = [sys.executable, *start, script, str(folder), str(size), "8"]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    names = {"proxy": "stream/domain_weights.jsonl", "plain": "stream/blocks/00000001.json"}
    for kind, name in names.items():
        both = (numbers(folder / kind / name) for folder in (alone, two))
        for one, other in zip(*both, strict=True):
            assert one == pytest.approx(other, abs=1e-6)
        first, last = (json.loads((f / kind / "log.json").read_text()) for f in (alone, two))
        keys = ["loss", *(f"loss/{name}" for name in run.NAMES)]
        for a, b in zip(first, last, strict=True):
            for key in keys[1:] if kind == "proxy" else keys:  # the proxy's own is weighed
                assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-4), key


def pieces(folder: Path) -> dict[str, Any]:
    """Sums that SmolLM2 of `folder` knows, and noise, as (8, 24) tokens."""
    tokens = AutoTokenizer.from_pretrained(folder)
    text = [f"{n} plus {n + 1} is {2 * n + 1}. " * 4 for n in range(8)]
    rng = np.random.default_rng(0)
    return {
        "sums": np.array([tokens(line)["input_ids"][:24] for line in text]),
        "noise": rng.integers(1000, len(tokens), (8, 24)),
    }


@pytest.mark.acceptance
def test_a_small_real_model_is_a_proxy(tmp_path: Path) -> None:
    """Of one that has drifted a little, the excess is where the reference is good."""
    folder, steps = pretrained.smol(tmp_path / "model"), 3
    domains = pieces(folder)
    of = Stream({"sums": 8, "noise": 8}, 4, {"sums": 0.5, "noise": 0.5}, tmp_path / "stream")
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    arguments = run.arguments(tmp_path, steps, 4, learning_rate=1e-4)
    trainer = Trainer(model, arguments, train_dataset=Mixed(domains, of, steps))
    Proxy(trainer, reference, steps, doremi.Options(step_size=0.5))
    trainer.train()
    first, *_, last = map(json.loads, (of.folder / "domain_weights.jsonl").read_text().splitlines())
    # The same model at first: no token is above the reference.
    assert max(first["excess_loss"].values()) == 0 and first["weights"]["sums"] == 0.5
    assert max(last["excess_loss"].values()) > 0 and sum(last["weights"].values()) == 1
    losses = [line for line in trainer.state.log_history if "loss" in line]
    assert all(0 < line["loss/sums"] < 3 < line["loss/noise"] for line in losses)


@pytest.mark.acceptance
@pytest.mark.parametrize("method", ["odm", "ado"])
def test_a_small_real_model_learns_an_online_mixture(method: str, tmp_path: Path) -> None:
    """Every block is what the method makes of the losses that were logged."""
    folder, steps, lag = pretrained.smol(tmp_path / "model"), 8, 2
    of, same = (
        Stream({"sums": 8, "noise": 8}, 4, None, tmp_path / name, every=1)
        for name in ("stream", "same")
    )
    arguments = run.arguments(tmp_path, steps, 4, learning_rate=1e-4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = Trainer(model, arguments, train_dataset=Mixed(pieces(folder), of, steps))
    DomainLosses(trainer, Learner(of, method, steps, lag=lag))
    trainer.train()
    again = Learner(same, method, steps, lag=lag)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for step, line in enumerate(lines):
        tokens = torch.from_numpy(of.quota(step) * 23).double()
        means = torch.tensor([line.get(f"loss/{n}", 0.0) for n in of.names], dtype=torch.float64)
        again.report(means * tokens, tokens)
    for step in range(steps):
        assert of.weights(step) == pytest.approx(same.weights(step), abs=1e-6)
    if method == "odm":  # ado first gathers losses, for longer than this
        assert abs(of.weights(steps - 1) - 0.5).max() > 1e-3


def numbers(path: Path) -> list[float]:
    """All of a file of JSON lines, but for their keys."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    found: list[float] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)
        else:
            found.append(value)

    for line in lines:
        walk(json.loads(line))
    return found
