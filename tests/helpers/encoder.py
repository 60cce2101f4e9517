"""A sentence encoder that learned nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from doremi_train.data.tokens import tokenizer as tokenizers


def untrained(folder: Path, texts: Sequence[str], **shape: Any) -> Path:
    """A transformers folder of a small BERT, with a tokeniser learned on the texts."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    backend = tokenizers.learn(list(texts), 400)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>").save_pretrained(
        folder
    )
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**({"vocab_size": 400, "intermediate_size": 32} | small | shape))
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder
