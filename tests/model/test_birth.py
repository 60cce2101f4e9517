"""Birth of a model: values that follow from seed and name, as transformers means them, and the
memory that they take on the way."""

import hashlib
import math
from typing import Any

import pytest
import torch
from helpers.memory import Allocated, one_of
from torch import Tensor

from doremi_train.model import birth, configs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.model.optim import OptimizerOptions
from doremi_train.parallel import engine
from doremi_train.parallel.place import Place

VOCABULARY = 300
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48,
}  # fmt: skip
LLAMA = {"model_type": "llama", **SMALL}
GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 32}
SEED = 61


def resolved(config: dict[str, Any], vocabulary: int = VOCABULARY) -> dict[str, Any]:
    return configs.resolve(ModelOptions(config=config), vocabulary, 0, 16)


def drawn(name: str) -> torch.Generator:
    """A generator as it begins for a tensor of this name."""
    first = hashlib.sha256(f"{SEED} {name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(first, "big"))


def test_values_are_those_of_a_plain_initialisation_drawn_by_name() -> None:
    """Normal of the config's width, ones and zeros; in GPT-2 what writes into the residual stream
    is drawn a second time, narrower by the root of twice the layers."""
    for config, std in ((LLAMA | {"initializer_range": 0.1}, 0.1), (GPT2, 0.02)):
        model = folders.build(resolved(config), SEED).inner
        for name, value in model.named_parameters():
            draws, plain = drawn(name), torch.empty(value.shape)
            if value.ndim == 1:
                plain.fill_(float("norm" in name or ".ln_" in name) * name.endswith("weight"))
            else:
                plain.normal_(0, std, generator=draws)
            if "c_proj.weight" in name:
                plain.normal_(0, std / math.sqrt(2 * 3), generator=draws)
            assert torch.equal(value, plain), name


def test_rows_are_those_of_the_whole_and_torchs_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    source, before = birth.Seeded(resolved(LLAMA), SEED), torch.random.get_rng_state()
    names = [name for name, _ in folders.shaped(resolved(LLAMA), SEED).inner.named_parameters()]
    wholes = {name: source(name) for name in names}
    for name in reversed(names):  # in any order, and as often as one likes
        assert torch.equal(source(name, slice(3, 20)), wholes[name][3:20])
    assert torch.equal(torch.random.get_rng_state(), before)


KINDS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gpt_neox": SMALL,
    "mixtral": SMALL | {"num_key_value_heads": 2},
    "gpt2": GPT2,
    "mamba": {"num_hidden_layers": 2, "hidden_size": 32},
    # A tensor is made from its neighbours.
    "rwkv": {"num_hidden_layers": 2, "hidden_size": 32, "attention_hidden_size": 32},
    "gpt_bigcode": GPT2,  # a mask of booleans
    "apertus": SMALL,  # has to be made whole
    # Two kinds of layers, and a scale as a buffer.
    "gemma3_text": SMALL | {"head_dim": 16, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_as_transformers_constructor_makes_it(kind: str) -> None:
    """What two of theirs have in common equal, and the rest as wide, within six standard errors."""
    config = resolved({**KINDS[kind], "model_type": kind})
    found, one, two = (
        tensors(folders.build(config, SEED).inner),
        theirs(config, 0),
        theirs(config, 1),
    )
    assert found.keys() == one.keys()
    for name, right in one.items():
        own = found[name]
        assert own.dtype == right.dtype and own.shape == right.shape
        if torch.equal(right, two[name]):
            assert torch.equal(own, right), name
        elif right.numel() >= 100:
            tolerance = 6 / math.sqrt(right.numel())
            assert abs(own.std() / right.std() - 1) < tolerance, name
            assert abs(own.mean() - right.mean()) < 2 * tolerance * right.std(), name


def theirs(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return tensors(configs.constructed(config))


def tensors(inner: Any) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in [*inner.named_parameters(), *inner.named_buffers()]}


# ── Memory ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rank", [0, 3])
def test_a_process_holds_its_own_part_and_one_tensor_more(rank: int) -> None:
    config = resolved({**LLAMA, "num_hidden_layers": 6}, vocabulary=2000)
    shapes = [p.numel() for p in folders.shaped(config, SEED).parameters()]
    whole, largest = 4 * sum(shapes), 4 * max(shapes)
    place = Place("fsdp2", torch.device("cpu"), False, {})
    with Allocated() as allocated:
        model = folders.shaped(config, SEED)
    assert allocated.most < whole / 4  # trying takes a layer and few tokens
    assert allocated.now < 4096  # rotary frequencies and the like
    with Allocated() as allocated, one_of(4, rank):
        parts = engine.build(place, model, OptimizerOptions()).parts()
    own = 4 * sum(part.numel() for part in parts)
    assert abs(own / (whole / 4) - 1) < 0.02
    assert own <= allocated.now < own + 4096
    assert allocated.most < own + largest + 4096


def test_what_is_tried_has_layers_that_are_alike_once() -> None:
    config = resolved({**LLAMA, "num_hidden_layers": 50})
    tried = birth.small(config, SEED)
    assert len(tried.model.layers) == 50
    one, two = tried.model.layers[0], tried.model.layers[49]
    assert one.mlp.up_proj.weight is two.mlp.up_proj.weight
    assert sum(p.numel() for p in tried.parameters()) < configs.parameters(config)[0] / 20
