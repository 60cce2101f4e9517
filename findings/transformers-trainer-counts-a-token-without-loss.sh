#!/usr/bin/env bash
# Losses of transformers' Trainer are (T - 1) / T of the mean for GPT-2, and the mean for Llama: the
# first token of a sequence, which has no loss, is counted or not by the name of the class.
#
# Versions: transformers 5.23.0, accelerate 1.15.0, torch 2.13.0. Seen 2026-11-30.
# A good guess: the Trainer divides the summed loss of a step by the tokens that have one, as its
# source says (labels[..., 1:]), so that its training and evaluation losses are the model's own, and
# a gradient does not depend on the architecture.
# What it does: it takes labels[..., 1:] only where the model's `loss_type` is that of causal language
# models, which follows from the class's name: *ForCausalLM has it. GPT2LMHeadModel has none (a
# warning says that the default is used, which is the very same shifted loss), so all T labels are
# counted: losses, evaluation's too, and gradients are (T - 1) / T of what they should be. With long
# sequences nobody sees it; here T = 8. Take losses from logits where models are compared, or weights
# follow from them. Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$work"
cat > shown.py <<'PYTHON'
import torch
from transformers import (
    GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments,
)

T = 8
rows = torch.randint(20, (16, T), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in rows]
gpt2 = {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": T}
llama = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}


def ratios(model: torch.nn.Module) -> tuple[float, float]:
    """Training loss of a step, and evaluation loss, over the model's own of the same batch."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        own = model(input_ids=rows, labels=rows).loss.item()
    arguments = TrainingArguments(
        output_dir="out", max_steps=1, per_device_train_batch_size=16, learning_rate=0.0,
        per_device_eval_batch_size=16, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    return trained / own, evaluated / own


found = {
    "GPT2LMHeadModel": ratios(GPT2LMHeadModel(GPT2Config(**gpt2))),
    "LlamaForCausalLM": ratios(LlamaForCausalLM(LlamaConfig(**llama))),
}
for name, values in found.items():
    print("%s: training loss / its own loss = %.4f, evaluation loss / its own = %.4f" % (name, *values))
assert all(abs(x - (T - 1) / T) < 1e-3 for x in found["GPT2LMHeadModel"]), "this has changed"
assert all(abs(x - 1) < 1e-3 for x in found["LlamaForCausalLM"])
PYTHON
"$work/env/bin/python" shown.py 2> errors | grep -v "^{" || { tail -20 errors >&2; exit 1; }
