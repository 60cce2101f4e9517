#!/usr/bin/env bash
# A lightning Trainer that resumes within an epoch reads its data from the first row again.
#
# Versions: lightning 2.6.6, torch 2.13.0. Seen 2026-11-30.
# A good guess: a checkpoint of step 5 holds the place in the epoch (trainer.global_step is restored,
# and so is batch_idx), so fit(ckpt_path=...) goes on with the sixth batch of an unshuffled DataLoader.
# What it does: it takes as many more steps as were left, from the first batch on: the first rows are
# trained on twice and the last ones never, unless the loader has a state_dict of its own.
# Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q lightning==2.6.6 torch==2.13.0
cd "$work"
"$work/env/bin/python" -W ignore - <<'PYTHON'
import logging

import lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Rows(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor(float(index))


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch_idx, int(batch)))
        return (self.weight * batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            trainer.save_checkpoint("at-5.ckpt")


def trainer():
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    off = dict.fromkeys(names, False)
    return pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[Save()], **off)


first, second = Model(), Model()
trainer().fit(first, DataLoader(Rows()))
trainer().fit(second, DataLoader(Rows()), ckpt_path="at-5.ckpt")
print("never stopped, (batch_idx, row):", first.seen)
print("resumed after 5 steps:", second.seen)
assert [row for _, row in first.seen] == list(range(10))
assert second.seen == [(5 + row, row) for row in range(5)]
PYTHON
