#!/usr/bin/env bash
# save_pretrained deletes model shards that it did not write.
#
# Versions: transformers 5.23.0, torch 2.13.0. Seen 2026-11-30.
# A good guess: a trainer whose processes write the shards of a model and their index may let
# save_pretrained(folder, state_dict={}) add the configs, which then writes no weights.
# What it does: every model-0000x-of-0000y.safetensors in the folder that is none of the files it has
# just written is deleted, whoever wrote it, without a word; the index stays, and names files that are
# gone. A file of another name stays.
# Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q transformers==5.23.0 torch==2.13.0
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import pathlib

from transformers import LlamaConfig, LlamaForCausalLM

small = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
model, folder = LlamaForCausalLM(small), pathlib.Path("model")
model.save_pretrained(folder, max_shard_size="30KB")
(folder / "weights.safetensors").write_bytes((next(folder.glob("*.safetensors"))).read_bytes())
before = {path.name for path in folder.iterdir()}
model.save_pretrained(folder, state_dict={})
after = {path.name for path in folder.iterdir()}
gone = sorted(before - after)
print(f"{len(before)} files before, {len(after)} after; gone: {', '.join(gone)}")
assert len(gone) > 1 and all(name.startswith("model-0000") for name in gone)
assert "weights.safetensors" in after and "model.safetensors.index.json" in after
PYTHON
