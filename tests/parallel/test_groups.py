"""What FSDP2 gathers at a time of a divided model: a layer, the embedding, the projection."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from doremi_train.model import configs, folders, language_model
from doremi_train.model.configs import ModelOptions
from doremi_train.parallel import comm, native

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48,
}  # fmt: skip
# And how many groups there are beside the layers.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (SMALL, 2),
    "gpt2": ({"n_layer": 2, "n_head": 2, "n_embd": 32}, 0),  # tied
    "cohere": (SMALL | {"tie_word_embeddings": False}, 2),  # a head that is not plain
    # A layer's mixer is not split either, and is in the layer.
    "mamba": ({"num_hidden_layers": 2, "hidden_size": 32, "tie_word_embeddings": False}, 2),
    # Embeddings are a module that is not split; here their weight is tied.
    "bert": (SMALL | {"is_decoder": True}, 0),
}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A world of one process, in which FSDP2 divides all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("narrow", [0, 128], ids=["head", "projection"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_divided_model_has_the_losses_and_gradients_of_a_whole_one(
    kind: str, narrow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "NARROW_ON_CPU", narrow)
    values, beside = KINDS[kind]
    options = ModelOptions(config={"model_type": kind, **values})
    config = configs.resolve(options, 300, 0, 16)
    whole, parts = folders.build(config, 0).eval(), folders.shaped(config, 0).eval()
    groups = parts.groups()
    assert len(groups) == 2 + beside
    comm.shard(parts, groups, CPU)
    native.fill(parts, CPU)
    tokens = torch.arange(18).view(2, 9)
    one, other = whole(tokens), parts(tokens)
    assert torch.equal(one, other)
    one.sum().backward()
    other.sum().backward()
    found = dict(parts.named_parameters())
    for name, parameter in whole.named_parameters():
        gradient = found[name].grad
        assert (gradient is None) == (parameter.grad is None), name
        assert gradient is None or torch.equal(comm.whole(gradient), parameter.grad), name
