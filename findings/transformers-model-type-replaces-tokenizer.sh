#!/usr/bin/env bash
# A folder's model_type decides which tokenizer AutoTokenizer opens, against its own tokenizer.json.
#
# Versions: transformers 5.23.0, tokenizers 0.23.3. Seen 2026-11-30.
# A good guess: a folder with a tokenizer.json and tokenizer_config.json that says
# PreTrainedTokenizerFast opens as exactly that tokenizer, whatever model lies beside it.
# What it does: with model_type qwen2 in config.json the class is Qwen2Tokenizer, which takes the
# vocabulary and merges only and brings a pre-tokenizer of its own; the same text becomes other ids,
# and nothing is said. With model_type llama the file is opened as it is.
# Who is concerned: whoever trains a tokenizer of their own for a Qwen2 architecture and saves both in
# one folder. Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q transformers==5.23.0 tokenizers==0.23.3
cd "$work"
"$work/env/bin/python" - <<'PYTHON'
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|endoftext|>"],
)
text = "In 2026 we counted 1234567 tokens, 7654321 bytes and 1234567 documents. " * 20
tokenizer.train_from_iterator([text], trainer)
own = tokenizer.encode(text).ids

found = {}
for kind in ("llama", "qwen2"):
    os.makedirs(kind)
    tokenizer.save(f"{kind}/tokenizer.json")
    with open(f"{kind}/tokenizer_config.json", "w") as file:
        json.dump(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}, file
        )
    with open(f"{kind}/config.json", "w") as file:
        json.dump({"model_type": kind, "vocab_size": tokenizer.get_vocab_size()}, file)
    opened = AutoTokenizer.from_pretrained(kind)
    ids = opened(text, add_special_tokens=False)["input_ids"]
    found[kind] = (type(opened).__name__, len(ids), ids == own)
    print(kind, *found[kind])
print("its own file:", len(own), "ids")
assert found["llama"][2], "llama: was the file as it is"
assert not found["qwen2"][2] and found["qwen2"][0] == "Qwen2Tokenizer", "qwen2: has changed"
PYTHON
