"""Models of transformers, built so small that the most naive way is quick."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from doremi_train.model import birth, folders
from doremi_train.model.language_model import LanguageModel

N, T, V, D = 4, 6, 13, 8
WIDE = {"hidden_size": D, "intermediate_size": 12, "num_attention_heads": 2}
SHAPES = {
    "llama": {"num_hidden_layers": 2, **WIDE},
    "gpt_neox": {"num_hidden_layers": 2, **WIDE},
    "gpt2": {"n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": T},  # Conv1D, positions, tied
    "qwen3": {"num_hidden_layers": 1, **WIDE, "num_key_value_heads": 1, "head_dim": 4},
}


def build(kind: str, attention: str = "eager", **more: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": V,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
        "use_cache": False,
    }
    dropout = (
        dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0) if kind == "gpt2" else {}
    )
    config = AutoConfig.for_model(kind, **(SHAPES[kind] | settings | dropout | more))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide mistakes
        parameter.data.normal_(std=0.5)
    return model


def loaded(folder: Path, vocabulary: int) -> LanguageModel:
    """A saved model, with its values."""
    model = folders.load(folder, vocabulary, "reference.path").eval()
    birth.fill(model, torch.device("cpu"))
    return model
