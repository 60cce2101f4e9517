"""The same small training in several trainers, each killed and resumed: run by a Python that has
the trainer, as `trainers.py TRAINER FOLDER KILLED_AT…`.

A table of logits is DoReMi's proxy over three domains whose mixture.json is written anew three
times. Every attempt is a process of its own, which kills itself in the middle of a step; the last
one goes to the end. `FOLDER/rows-N.jsonl` has what attempt N trained on.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from doremi_train.client import Mixed, Stream
from doremi_train.client.learned import Learner
from doremi_train.client.loader import Loader
from doremi_train.client.losses import token_losses
from doremi_train.client.proxy import Reweighting
from doremi_train.files import replacing, write_json
from doremi_train.methods import doremi

VOCABULARY, LENGTH, BATCH, EVERY, STEPS, SAVED = 23, 13, 8, 4, 24, 3
SIZES = {"a": 17, "b": 40, "c": 29}
MIXTURES = {  # from so many steps on, in blocks of EVERY
    0: {"a": 0.5, "b": 0.3, "c": 0.2},
    8: {"a": 0.1, "b": 0.2, "c": 0.7},
    12: {"a": 0.0, "b": 0.9, "c": 0.1},
    20: {"a": 0.6, "b": 0.39999, "c": 1e-5},
}
WRITTEN = {5: 8, 10: 12, 17: 20}  # after so many steps, well before a loader reads that far
OPTIONS = doremi.Options(step_size=0.5)
ADAM = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
CLIP = 1.0


def rows():
    """{domain: (N, LENGTH) tokens}, no two rows alike."""
    random = np.random.default_rng(0)
    return {name: random.integers(VOCABULARY, size=(n, LENGTH)) for name, n in SIZES.items()}


def reference(tokens):
    """(B, T, V) logits of a table that knows something."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(VOCABULARY, VOCABULARY, generator=generator)[tokens]


class Attempt:
    """What one process does: where it is, what it sees, when it dies."""

    def __init__(self, folder, number, killed_at):
        self.folder, self.killed_at, self.step = folder, killed_at, 0
        self._seen = (folder / f"rows-{number}.jsonl").open("w")
        if not (folder / "mixture.json").exists():
            write_json(folder / "mixture.json", MIXTURES[0])
        self.stream = Stream(SIZES, BATCH, folder / "mixture.json", folder / "stream", EVERY)

    def reweighting(self, stream):
        return Reweighting(stream, STEPS, OPTIONS)

    def learner(self, _):
        """Of a stream that nobody draws from."""
        stream = Stream(SIZES, BATCH, None, self.folder / "online", EVERY)
        return Learner(stream, "odm", STEPS)

    def logged(self, losses):
        """{domain: nats per token} of the last step, as the trainer logs them."""
        found = {key: float(x) for key, x in losses.items() if key.startswith("loss/")}
        write_json(self.folder / "losses.json", found)

    def mixed(self, domains=None):
        return Mixed(domains or rows(), self.stream, STEPS)

    def see(self, tokens):
        """Every forward of the model, of (B, T) tokens."""
        if self.step == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._seen.write(json.dumps([self.step, tokens.tolist()]) + "\n")
        self._seen.flush()

    def stepped(self, step):
        """After so many steps."""
        self.step = step
        if step in WRITTEN:
            write_json(self.folder / "mixture.json", MIXTURES[WRITTEN[step]])


class Table(torch.nn.Module):
    def __init__(self, attempt):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(VOCABULARY, VOCABULARY))
        self.attempt = attempt

    def forward(self, tokens):
        self.attempt.see(tokens)
        return self.table[tokens]


# A loop of one's own


def by_hand(attempt, key, loader, prepared=lambda *parts: parts):
    """`key` is that of a row's tokens, `loader` one that has a state, and `prepared` what becomes
    of model, optimizer and loader."""
    model, path = Table(attempt), attempt.folder / "checkpoint.pt"
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    parts = {"model": model, "optimizer": optimizer}
    reweighting = attempt.reweighting(attempt.stream)
    if path.exists():
        saved = torch.load(path)
        attempt.step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    loader.load_state_dict({"rows": attempt.step * BATCH})
    model, optimizer, loader = prepared(model, optimizer, loader)
    reweighting.begin(attempt.step)
    for batch in loader:
        tokens, labels = batch[key][:, :-1], batch[key][:, 1:]
        losses, present = token_losses(model(tokens), labels)
        held, _ = token_losses(reference(tokens), labels)
        reweighting.objective(losses, held, present, batch["domain"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        attempt.stepped(attempt.step + 1)
        if attempt.step % SAVED == 0:
            reweighting.save()
            states = {name: part.state_dict() for name, part in parts.items()}
            with replacing(path) as new:
                torch.save({"step": attempt.step} | states, new)
    reweighting.finish("by hand")


def accelerate(attempt):
    """Its own loader, made from a plain one."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    class Plain(torch.utils.data.DataLoader):
        def load_state_dict(self, state):
            self.skipped = state["rows"] // BATCH

    def prepared(model, optimizer, loader):
        skipped = loader.skipped
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        return model, optimizer, accelerator.skip_first_batches(loader, skipped)

    by_hand(attempt, "input_ids", Plain(attempt.mixed(), BATCH), prepared)


def megatron(attempt):
    """GPTDatasets of a sample a document, in their own shuffled order."""
    by_hand(attempt, "tokens", Loader(attempt.mixed(gpt_datasets(attempt.folder)), BATCH))


def litdata(attempt):
    """Streaming datasets, one a domain."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    for name, domain in rows().items():
        if not (attempt.folder / name).exists():
            writer = BinaryWriter(str(attempt.folder / name), chunk_size=8)
            for number, row in enumerate(domain):
                writer.add_item(number, torch.from_numpy(row))
            writer.done()
            writer.merge()
    domains = {name: StreamingDataset(str(attempt.folder / name)) for name in SIZES}
    by_hand(attempt, "input_ids", Loader(attempt.mixed(domains), BATCH))


def gpt_datasets(folder):
    import types

    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, domain in rows().items():
        if not (folder / f"{name}.idx").exists():
            builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=np.int32)
            for row in domain:
                builder.add_item(torch.from_numpy(row).int())
                builder.end_document()
            builder.finalize(f"{folder / name}.idx")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=LENGTH,
        blend=([str(folder / name) for name in SIZES], None),  # without weights: a pass of each
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=types.SimpleNamespace(
            eod=0, unique_identifiers={}, pad=VOCABULARY, vocab_size=30
        ),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
    )
    blended = BlendedMegatronDatasetBuilder(
        GPTDataset, [None, None, None], lambda: True, config
    ).build()[0]
    domains = dict(zip(SIZES, blended.datasets, strict=True))
    torch.distributed.destroy_process_group()
    order = {name: [row["tokens"].tolist() for row in each] for name, each in domains.items()}
    write_json(folder / "order.json", order)
    return domains


# Trainers with a loop of their own


def transformers(attempt):
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.modeling_outputs import CausalLMOutput

    from doremi_train.client.hugging_face import Proxy

    class Causal(Table):
        def forward(self, input_ids, labels=None):
            logits = super().forward(input_ids)
            return CausalLMOutput(loss=logits.sum(), logits=logits)

    class Reference(torch.nn.Module):
        def forward(self, input_ids):
            return CausalLMOutput(logits=reference(input_ids))

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            attempt.step = state.global_step

        def on_step_end(self, args, state, control, **_):
            attempt.stepped(state.global_step)

    arguments = TrainingArguments(
        output_dir=str(attempt.folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=ADAM["lr"],
        lr_scheduler_type="constant",
        adam_beta1=ADAM["betas"][0],
        adam_beta2=ADAM["betas"][1],
        adam_epsilon=ADAM["eps"],
        max_grad_norm=CLIP,
        save_steps=SAVED,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(Causal(attempt), arguments, train_dataset=attempt.mixed())
    Proxy(trainer, Reference(), STEPS, OPTIONS)
    trainer.add_callback(Steps())
    trainer.train(resume_from_checkpoint=any(attempt.folder.glob("out/checkpoint-*")))
    attempt.logged([line for line in trainer.state.log_history if "loss" in line][-1])


def lightning(attempt):
    import lightning as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from doremi_train.client.lightning import DomainLosses

    reweighting = attempt.reweighting(attempt.stream)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Table(attempt)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), **ADAM)

        def training_step(self, batch, _):
            tokens, labels = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
            losses, present = token_losses(self.model(tokens), labels)
            held, _ = token_losses(reference(tokens), labels)
            part = reweighting.objective(losses, held, present, batch["domain"])
            return {"loss": part, "losses": losses.detach(), "present": present}

    class Steps(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            attempt.step = trainer.global_step

        def on_train_batch_end(self, trainer, *_):
            attempt.stepped(trainer.global_step)
            attempt.logged(trainer.logged_metrics)

    losses = DomainLosses(attempt.stream, attempt.learner(attempt.stream), reweighting)
    saving = ModelCheckpoint(attempt.folder / "out", every_n_train_steps=SAVED, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=CLIP,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[losses, Steps(), saving],
    )
    last = attempt.folder / "out" / "last.ckpt"
    resumed = str(last) if last.exists() else None
    trainer.fit(Module(), Loader(attempt.mixed(), BATCH), ckpt_path=resumed)


def torchtitan(attempt):
    titan_on_a_cpu()
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import TrainingConfig
    from torchtitan.protocols.model import BaseModel
    from torchtitan.protocols.model_spec import ModelSpec

    from doremi_train.client.torchtitan import DomainTrainer, MixedDataLoader

    class Titan(BaseModel):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseModel.Config):
            def update_from_config(self, *, config, **_):
                pass

            def get_nparams_and_flops(self, model, seq_len):
                return VOCABULARY**2, 1

        def __init__(self, config):
            super().__init__()
            self.table = torch.nn.Parameter(torch.empty(VOCABULARY, VOCABULARY))

        def _init_self_parameters(self):
            torch.nn.init.zeros_(self.table)

        def forward(self, tokens, positions=None):
            attempt.see(tokens)
            return self.table[tokens]

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config, *, tokenizer_path):
            super().__init__()

        encode = decode = get_vocab_size = None

    class Steps(DomainTrainer):
        @dataclass(kw_only=True, slots=True)
        class Config(DomainTrainer.Config):
            pass

        def train_step(self, data_iterator):
            attempt.step = self.step - 1
            super().train_step(data_iterator)
            attempt.stepped(self.step)

    spec = ModelSpec(
        name="table",
        flavor="small",
        model=Titan.Config(),
        parallelize_fn=lambda model, **_: model,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
    config = Steps.Config(
        model_spec=spec,
        tokenizer=NoTokenizer.Config(),
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        dump_folder=str(attempt.folder / "out"),
        dataloader=MixedDataLoader.Config(mixed=attempt.mixed),
        optimizer=default_adamw(**ADAM),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, min_lr_factor=1.0),
        training=TrainingConfig(
            local_batch_size=BATCH,
            seq_len=LENGTH - 1,
            steps=STEPS,
            max_norm=CLIP,
            disable_cuda_graphs=True,
        ),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(
            enable=True, interval=SAVED, last_save_model_only=False
        ),
        learner=attempt.learner,
        reweighting=attempt.reweighting,
        reference=reference,
    )
    trainer = config.build()
    trainer.metrics_processor.logger.log = lambda losses, step: attempt.logged(losses)
    trainer.train()
    trainer.close()


def titan_on_a_cpu():
    """torchtitan asks a GPU for its memory and sets timeouts of its processes there; all else runs
    as it is."""
    import time
    import types

    import torch._utils

    torch._utils._get_available_device_type = lambda: "cpu"
    import torchtitan.components.metrics
    import torchtitan.distributed.utils
    import torchtitan.trainer

    keys = ("max_reserved_gib", "max_reserved_pct", "max_active_gib", "max_active_pct")
    none = types.SimpleNamespace(**dict.fromkeys((*keys, "num_alloc_retries", "num_ooms"), 0))
    torchtitan.components.metrics.build_device_memory_monitor = lambda: types.SimpleNamespace(
        device_name="cpu", get_peak_stats=lambda: none, reset_peak_stats=lambda: None
    )
    torchtitan.distributed.utils.set_pg_timeouts = lambda **_: None
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": "0"})
    torchtitan.trainer.time = types.SimpleNamespace(
        perf_counter=time.perf_counter, sleep=lambda seconds: None
    )


TRAINERS = {
    each.__name__: each
    for each in (accelerate, litdata, megatron, transformers, lightning, torchtitan)
}


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    for number, killed_at in enumerate([*map(int, sys.argv[3:]), None]):
        child = os.fork()
        if not child:
            TRAINERS[name](Attempt(folder, number, killed_at))
            sys.stdout.flush()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        wanted = signal.SIGKILL if killed_at is not None else 0
        if os.waitstatus_to_exitcode(status) != -wanted:
            sys.exit(f"attempt {number}: status {status}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
