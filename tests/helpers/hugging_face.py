"""A run of a transformers Trainer over domains of numbers, in this process or as

torchrun … tests/helpers/hugging_face.py FOLDER PER_DEVICE STEPS
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from doremi_train.client import Mixed, Stream
from doremi_train.client.hugging_face import DomainLosses, Proxy
from doremi_train.client.learned import Learner
from doremi_train.methods import doremi

VOCABULARY, LENGTH, BATCH = 23, 12, 8
NAMES = ("same", "counting", "noise")


def domains() -> dict[str, np.ndarray[Any, Any]]:
    """One token again and again, numbers that count up, and noise."""
    rng = np.random.default_rng(0)
    start = rng.integers(VOCABULARY, size=(40, 1))
    return {
        "same": np.full((17, LENGTH), 3),
        "counting": (start + np.arange(LENGTH)) % VOCABULARY,
        "noise": rng.integers(VOCABULARY, size=(29, LENGTH)),
    }


def model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, **off
    )
    return GPT2LMHeadModel(shape)


def stream(folder: Path, mixture: Any, every: int = 4, batch: int = BATCH) -> Stream:
    sizes = {name: len(rows) for name, rows in domains().items()}
    return Stream(sizes, batch, mixture, folder / "stream", every, seed=1)


def arguments(folder: Path, steps: int, per_device: int, **more: Any) -> TrainingArguments:
    about: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": steps,
        "per_device_train_batch_size": per_device,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(about | more))


def trainer(folder: Path, of: Stream, steps: int, per_device: int = BATCH, **more: Any) -> Trainer:
    said = arguments(folder, steps, per_device, **more)
    return Trainer(model(0), said, train_dataset=Mixed(domains(), of, steps))


def main() -> None:
    """A proxy, and then an online mixture, each in a folder of its own."""
    folder, per_device, steps = Path(sys.argv[1]), *map(int, sys.argv[2:])
    for kind in ("proxy", "plain"):
        within = folder / kind
        if kind == "proxy":
            of = stream(within, dict.fromkeys(NAMES, 1 / 3))
            run = trainer(within, of, steps, per_device)
            Proxy(run, model(1), steps, doremi.Options(step_size=0.5))
        else:
            of = stream(within, None)
            run = trainer(within, of, steps, per_device)
            DomainLosses(run, Learner(of, "odm", steps, lag=2))
        run.train()
        if run.is_world_process_zero():
            (within / "log.json").write_text(json.dumps(run.state.log_history))
    if dist.is_initialized():
        # The trainers' models keep the group, also when it was destroyed, and gloo's threads may
        # abort while the interpreter ends (pytorch/pytorch#190489). All is written.
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
