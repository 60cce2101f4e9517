"""Costs counted from shapes against what torch counts while the real thing runs."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from doremi_train.config import conf_dir
from doremi_train.model import configs, costs, folders, language_model
from doremi_train.model import language_model as lm
from doremi_train.model.configs import ModelOptions
from doremi_train.storage import parts

LENGTH, ROWS, VOCABULARY = 48, 4, 512
CPU = torch.device("cpu")

TINY = yaml.safe_load((conf_dir() / "model" / "tiny.yaml").read_text())["config"]
LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}
MODELS = {"tiny": TINY, "llama": LLAMA, "qwen3": QWEN, "gpt2": GPT2}


def config(values: dict[str, Any]) -> dict[str, Any]:
    return configs.resolve(ModelOptions(config=dict(values)), VOCABULARY, 0, LENGTH)


def built(
    values: dict[str, Any], checkpointing: bool = False
) -> tuple[language_model.LanguageModel, torch.Tensor]:
    language_model = folders.build(config(values), 0, checkpointing).train()
    # The counter passes over fused attention on a CPU.
    language_model.inner.set_attn_implementation("eager")
    tokens = torch.randint(
        0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0)
    )
    return language_model, tokens


def counted(compute: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


# ── FLOPs ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_is_what_torch_counts(name: str) -> None:
    language_model, tokens = built(MODELS[name])
    with torch.no_grad():
        found = counted(lambda: language_model(tokens))
    expected = costs.forward(costs.shape(config(MODELS[name])), LENGTH) * ROWS * LENGTH
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_step_is_what_torch_counts(
    name: str, fused: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, *(("_LOGITS_ON_CPU", 1000) if fused else ("NARROW_ON_CPU", 0)))
    language_model, tokens = built(MODELS[name], checkpointing)
    of = costs.shape(config(MODELS[name]))
    found = counted(lambda: language_model(tokens).sum().backward())
    expected = costs.forward(of, LENGTH) + costs.backward(of, ROWS, LENGTH, checkpointing)
    expected *= ROWS * LENGTH
    assert found == pytest.approx(expected, rel=0.01) or (
        checkpointing and 0.92 < found / expected < 1
    )
    assert fused or checkpointing or expected == 3 * costs.forward(of, LENGTH) * ROWS * LENGTH


def test_of_a_mixture_of_experts_those_count_that_a_token_passes() -> None:
    values = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    one = {**values, "num_local_experts": 2}  # where both are used
    few, many = (costs.shape(config(v)) for v in (one, values))
    routers = 3 * 2 * 128  # two experts more to choose from, in every layer
    assert many.matrices - few.matrices == routers
    assert many.parameters > 1.5 * few.parameters


# ── Memory ──────────────────────────────────────────────────────────────────────────


def memory(
    strategy: str, processes: int, optimizer: str = "adamw", beside: costs.Shape | None = None
) -> costs.Memory:
    return costs.memory(
        costs.shape(config(TINY)),
        strategy=strategy,
        processes=processes,
        optimizer=optimizer,
        rows=ROWS,
        length=LENGTH,
        precision="fp32",
        checkpointing=False,
        reference=7,
        beside=beside,
    )


@pytest.mark.parametrize(
    ("strategy", "parts"),
    # of parameters, gradients and optimiser states in bytes a parameter, on four processes
    [
        ("single", (4, 4, 8)), ("ddp", (4, 4, 8)), ("fsdp2", (1, 1, 2)), ("zero1", (4, 4, 3)),
        ("zero2", (4, 1, 3)), ("zero3", (1, 1, 3)),
    ],
)  # fmt: skip
def test_states_are_divided_as_the_engine_divides_them(
    strategy: str, parts: tuple[int, int, int]
) -> None:
    count = costs.shape(config(TINY)).parameters
    found = memory(strategy, 4)
    assert (
        found[:3] == pytest.approx([part * count for part in parts], abs=4)
        and found.reference == 28
    )


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimiser_states_are_those_that_torch_keeps(name: Any) -> None:
    from doremi_train.model import optim
    from doremi_train.model.optim import OptimizerOptions

    language_model, tokens = built(TINY)
    optimizer = optim.build(language_model, OptimizerOptions(optimizer=name))
    language_model(tokens).sum().backward()
    optimizer.step()
    kept = sum(
        v.numel() * 4 for state in optimizer.state.values() for v in state.values() if v.ndim
    )
    assert memory("single", 1, name).optimizer == pytest.approx(kept, abs=4 * len(optimizer.state))


def peak(values: dict[str, Any], checkpointing: bool, precision: Any) -> int:
    """The most bytes that torch's allocator gives out at a time during forward and backward, beyond
    parameters and their gradients."""
    language_model = folders.build(config(values), 0, checkpointing, precision).train()
    tokens = torch.arange(ROWS * (LENGTH + 1)).view(ROWS, -1) % VOCABULARY
    language_model(tokens).sum().backward()  # gradients stay
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        language_model(tokens).sum().backward()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


NEOX = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
WIDE = {**LLAMA, "hidden_size": 256, "intermediate_size": 768, "num_key_value_heads": 4}


@pytest.mark.parametrize("values", [TINY, NEOX, WIDE], ids=["tiny", "neox", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_within_a_tenth_of_what_torch_gives_out(
    values: dict[str, Any], checkpointing: bool, precision: Any
) -> None:
    found = peak(values, checkpointing, precision)
    of = costs.shape(config(values))
    estimate = costs.activations(of, ROWS, LENGTH, precision, checkpointing)
    assert estimate == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_activations_of_other_kinds_are_about_what_torch_gives_out(
    name: str, checkpointing: bool
) -> None:
    found = peak(MODELS[name], checkpointing, "fp32")
    of = costs.shape(config(MODELS[name]))
    assert 1 / 1.5 < costs.activations(of, ROWS, LENGTH, "fp32", checkpointing) / found < 1.5


def test_logits_stop_growing_where_the_projection_is_fused() -> None:
    of = costs.shape(config(NEOX))
    small, large = (of._replace(vocabulary=v) for v in (1 << 10, 1 << 17))
    rows, length = 4, 1024
    bare = costs.activations(of._replace(vocabulary=0), rows, length, "fp32", False)
    assert costs.activations(small, rows, length, "fp32", False) - bare == 12 * rows * length << 10
    assert (
        costs.activations(large, rows, length, "fp32", False) - bare
        == 12 * language_model._LOGITS_ON_CPU
    )


def test_a_checkpoint_is_what_is_saved(tmp_path: Path) -> None:
    from doremi_train.model import optim
    from doremi_train.model.optim import OptimizerOptions

    language_model, tokens = built(LLAMA)
    optimizer = optim.build(language_model, OptimizerOptions())
    language_model(tokens).sum().backward()
    optimizer.step()
    named = dict(language_model.named_parameters())
    tensors = named | {
        f"{name}/{key}": value
        for name, tensor in named.items()
        for key, value in optimizer.state[tensor].items()
    }
    path = tmp_path / parts.part_name(0, 1)
    parts.write(path, [parts.share(name, tensor, 0, 1) for name, tensor in tensors.items()])
    found = costs.checkpoint(costs.shape(config(LLAMA)), "adamw")
    assert path.stat().st_size == pytest.approx(found, rel=0.05)


def test_what_fsdp_gathers_is_whole_layers_and_the_rest() -> None:
    untied = costs.shape(config(LLAMA))
    inner = configs.skeleton(config(LLAMA))
    layer = sum(p.numel() for p in inner.base_model.layers[0].parameters())
    assert (untied.block, untied.ends) == (layer, VOCABULARY * untied.hidden)
    assert untied.outside == untied.hidden == untied.parameters - 3 * layer - 2 * untied.ends
    of = costs.shape(config(TINY))
    assert of.ends == 0 and of.outside == of.parameters - of.layers * of.block
    assert memory("fsdp2", 4).gathered == memory("zero3", 4).gathered > 0
    assert memory("ddp", 4).gathered == memory("zero2", 4).gathered == 0
    # Of a divided reference no gradients.
    large = untied._replace(block=900 * untied.block)
    assert costs.looked_at(large) == 4 * (3 * large.block + large.outside)
    assert memory("ddp", 4, beside=large).gathered == costs.looked_at(large)
    kept = 4 * (of.ends + of.outside)
    assert memory("fsdp2", 4, beside=large).gathered == costs.looked_at(large) + kept


# ── Time ────────────────────────────────────────────────────────────────────────────


def modules() -> int:
    return sum(issubclass(type(each), torch.nn.Module) for each in gc.get_objects())


def test_a_measured_micro_step_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_REPETITIONS", 8)  # so that a machine with other work tells no lie
    gc.collect()
    before = torch.get_rng_state(), modules()
    pace = costs.measure(config(TINY), ROWS, LENGTH, "fp32", False, CPU)
    assert isinstance(pace, costs.Pace) and 0 < pace.look < pace.learn < 10
    assert torch.equal(torch.get_rng_state(), before[0])
    assert modules() == before[1]


def test_on_a_cpu_fewer_rows_are_tried_and_what_is_too_large_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, tried = costs.shape(config(TINY)), []
    really = costs._try

    def record(config: dict[str, Any], rows: int, *more: Any) -> costs.Pace:
        tried.append(rows)
        return really(config, rows, *more)

    monkeypatch.setattr(costs, "_try", record)
    one = LENGTH * 3 * costs.forward(of, LENGTH)  # FLOPs of a sequence
    monkeypatch.setattr(costs, "_CPU_FLOPS", 2.5 * one)
    assert isinstance(
        costs.measure(config(TINY), 100, LENGTH, "fp32", False, CPU), costs.Pace
    ) and tried == [2]
    monkeypatch.setattr(costs, "_CPU_FLOPS", 0.5 * one)
    reason = costs.measure(config(TINY), 100, LENGTH, "fp32", False, CPU)
    assert isinstance(reason, str) and "too many to try on a CPU" in reason and tried == [2]
