"""What a step costs: the proxy's, with live and with cached reference losses, over a plain language
model's of the same trainer; and that one over the shortest loop one would write by hand, and over
HF Trainer. All train the same model of transformers on as many tokens, with the same optimiser,
clipping and precision.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks import common
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.evaluation.losses import EvaluationOptions
from doremi_train.methods import Objective, cross_entropy, doremi
from doremi_train.model import configs, costs, folders
from doremi_train.model.configs import ModelOptions
from doremi_train.model.language_model import LanguageModel
from doremi_train.parallel import engine, place
from doremi_train.parallel.launcher import EngineOptions
from doremi_train.parallel.place import start
from doremi_train.storage.runs import Run
from doremi_train.training import frozen
from doremi_train.training.task import Position, Task, TrainingOptions
from doremi_train.training.trainer import Trainer

DOMAINS = 8
STEPS = 1 << 20  # of the schedule: no side comes to its end
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # FLOPs a second in bf16

Steps = Generator[Any, None, None]


class Size(NamedTuple):
    vocabulary: int
    batch: int  # sequences
    length: int  # tokens


# 0.2M, 9M, 110M.
SIZES = {
    "tiny": Size(1024, 32, 128),
    "small": Size(16384, 8, 128),
    "280m": Size(32768, 16, 1024),
}


class Setting(NamedTuple):
    """What all sides have in common."""

    config: dict[str, Any]  # of transformers
    training: TrainingOptions
    store: TokenStore
    place: place.Place
    folder: Path
    fused: bool = True  # projection and loss, where the trainer would

    def tokens(self) -> NDArray[np.unsignedinteger]:
        """(N,) of the first domain, as they stand in a shard."""
        length = self.training.sequence_length
        sequences = np.arange(self.store.sequences("train", length)[0])
        tokens = self.store.gather("train", np.zeros_like(sequences), sequences, length)
        return tokens[:, :-1].ravel().astype(np.uint16)


# ── The sides ───────────────────────────────────────────────────────────────────────


def ours(
    of: Setting, label: str, objective: Objective, options: Any, reference: frozen.Reference | None
) -> Steps:
    """The trainer, with its sampler, its logs and everything but evaluations and checkpoints."""
    task = Task(
        label=label,
        run=Run(of.folder / label, "step", {}),
        objective=objective,
        objective_options=options,
        store=of.store,
        seed=0,
        training=of.training,
        evaluation=EvaluationOptions(every=STEPS),
        accumulation="exact",
        reference=reference,
    )
    trained = built(of, 0)
    if not of.fused:
        trained.projection = None
    trainer = Trainer(task, trained, of.place)
    start = Position(0, objective.init(DOMAINS, STEPS, options), np.zeros(DOMAINS, dtype=np.int64))
    yield from trainer.steps(start)


def built(of: Setting, seed: int) -> LanguageModel:
    return folders.build(of.config, seed, precision=of.training.precision)


def plain(of: Setting, label: str = "plain") -> Steps:
    uniform = cross_entropy.Options(weights=(1 / DOMAINS,) * DOMAINS)
    return ours(of, label, cross_entropy, uniform, None)


def live(of: Setting) -> Steps:
    reference = frozen.Live(engine.frozen(of.place, built(of, 1)), of.place.device)
    return ours(of, "live", doremi, doremi.Options(), reference)


def cached(of: Setting) -> Steps:
    """Every loss is in the table, as in a run after another one that filled it."""
    length = of.training.sequence_length
    table = frozen.Table(
        of.folder, of.store, frozen.recipe("some", of.store, length, of.training.precision)
    )
    table.write(np.arange(len(table)), np.full((len(table), length), 9.0, np.float16))
    return ours(
        of, "cached", doremi, doremi.Options(), frozen.Cached(table, _no_model, of.place.device)
    )


def _no_model() -> frozen.Live:
    raise AssertionError("a loss was not in the table")


def handwritten(of: Setting) -> Steps:
    """The shortest loop: one stream of tokens, nothing to resume, no logs."""
    device, length, stream = of.place.device, of.training.sequence_length, of.tokens()
    lm = folders.build(of.config, 0).inner.to(device)
    optimizer = torch.optim.AdamW(
        lm.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99999)
    random = np.random.default_rng(0)
    while True:
        at = random.integers(len(stream) - length, size=(of.training.batch_size, 1))
        tokens = torch.from_numpy(stream[at + np.arange(length + 1)].astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=of.training.precision == "bf16"):
            logits = lm(input_ids=tokens[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield None


def hf_trainer(of: Setting) -> Steps:
    """transformers.Trainer in a thread of its own, which waits after every step until it is asked
    for the next."""
    import transformers

    length, stream = of.training.sequence_length, torch.from_numpy(of.tokens().astype(np.int64))
    examples = [{"input_ids": piece, "labels": piece} for piece in stream.split(length)[:-1]]
    wanted, done = threading.Semaphore(0), threading.Semaphore(0)
    left: list[BaseException | None] = []

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wanted.acquire()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = bool(left)
            done.release()

    arguments = transformers.TrainingArguments(
        output_dir=str(of.folder / "hf_trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=of.training.batch_size,
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=of.training.precision == "bf16",
        use_cpu=of.place.device.type == "cpu",
        logging_steps=of.training.log_every,
        dataloader_drop_last=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        folders.build(of.config, 0).inner, arguments, train_dataset=examples, callbacks=[Turns()]
    )

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            left.append(error)
            done.release()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        while True:
            wanted.release()
            done.acquire()
            if left and left[0] is not None:
                raise left[0]
            yield None
    finally:
        left.append(None)
        wanted.release()
        thread.join()


SIDES: dict[str, Callable[[Setting], Steps]] = {
    "plain": plain,
    "live": live,
    "cached": cached,
    "handwritten": handwritten,
    "hf_trainer": hf_trainer,
}
RATIOS = {
    "live_over_plain": ("live", "plain"),
    "cached_over_plain": ("cached", "plain"),
    "plain_over_handwritten": ("plain", "handwritten"),
    "plain_over_hf_trainer": ("plain", "hf_trainer"),
    "compiled_over_plain": ("compiled", "plain"),
}


# ── Measuring ───────────────────────────────────────────────────────────────────────


def measure(given: argparse.Namespace) -> common.Result:
    """The ratios of every model; those of the last one also under their bare names."""
    torch.set_num_threads(given.threads)
    ratios: dict[str, common.Ratio] = {}
    figures: dict[str, Any] = {"threads": given.threads, "clock": given.clock}
    for name in given.model:
        model_ratios, figures[name] = of_model(name, given)
        ratios |= {f"{name}.{key}": value for key, value in model_ratios.items()}
    return common.Result(model_ratios | ratios, figures)


def of_model(
    name: str, given: argparse.Namespace
) -> tuple[dict[str, common.Ratio], dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # what the trainers say
        of = setting(name, given, folder)
        steps = {
            side: stack.enter_context(contextlib.closing(make(of))) for side, make in SIDES.items()
        }
        figures: dict[str, Any] = {}
        if given.compile:
            steps["compiled"] = plain(
                of._replace(place=of.place._replace(compile=True)), "compiled"
            )
            began = time.perf_counter()
            next(steps["compiled"])
            figures["first_compiled_step_seconds"] = time.perf_counter() - began
        # Steps a turn: a GPU is to be asked ahead.
        each = 10 if of.place.device.type == "cuda" else 1
        turns = {side: turn(of.place.device, its, each) for side, its in steps.items()}
        clock = time.process_time if given.clock == "cpu" else time.perf_counter
        times = common.alternate(
            turns, given.rounds or (5 if given.quick else 40), warm_up=3, clock=clock
        )
    seconds = {side: statistics.median(rounds) / each for side, rounds in times.items()}
    figures |= described(of, seconds)
    common.table(
        f"{name}: {figures['parameters'] / 1e6:.1f}M parameters, {figures['tokens_per_step']} "
        "tokens a step",
        ("side", "ms a step", "tokens/s"),
        [
            (side, 1e3 * took, round(figures["tokens_per_step"] / took))
            for side, took in seconds.items()
        ],
    )
    pairs = {key: pair for key, pair in RATIOS.items() if set(pair) <= set(times)}
    return {
        key: common.ratio(times[above], times[below]) for key, (above, below) in pairs.items()
    }, figures


def setting(name: str, given: argparse.Namespace, folder: Path) -> Setting:
    usual = SIZES.get(name, SIZES["small"])
    size = Size(
        *(
            mine or its
            for mine, its in zip((given.vocabulary, given.batch, given.length), usual, strict=True)
        )
    )
    training = TrainingOptions(
        steps=STEPS,
        batch_size=size.batch,
        sequence_length=size.length,
        checkpoint_every=STEPS,
        precision=given.precision,
        threads=given.threads,
    )
    place = start(EngineOptions(device=given.device), given.precision, timeout=60)
    store = common.token_store(folder / "data", DOMAINS, 512 * (size.length + 1), size.vocabulary)
    preset = ModelOptions(**configs.preset(name, "--model"))
    config = configs.resolve(preset, store.vocabulary_size, store.end_of_document, size.length)
    return Setting(config, training, store, place, folder)


def turn(device: torch.device, steps: Steps, count: int) -> Callable[[], None]:
    """Take so many steps, and wait until the device has done them."""

    def taken() -> None:
        for _ in range(count):
            next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return taken


def described(of: Setting, seconds: dict[str, float]) -> dict[str, Any]:
    """Sizes, absolute times, the floor of a live reference, and what part of the accelerator's peak
    is used."""
    shape, training = costs.shape(of.config), of.training
    rows, length, device = training.batch_size, training.sequence_length, of.place.device
    forward = costs.forward(shape, length)
    step = forward + costs.backward(shape, rows, length, False, device.type)
    achieved = 3 * forward * rows * length / seconds["plain"]  # without what is computed again
    peak = [
        peak
        for name, peak in PEAK.items()
        if device.type == "cuda" and name in torch.cuda.get_device_name()
    ]
    return {
        "parameters": shape.parameters,
        "tokens_per_step": rows * length,
        "size": Size(shape.vocabulary, rows, length)._asdict(),
        "precision": training.precision,
        "floor_of_live": 1 + forward / step,
        "seconds_per_step": seconds,
        "model_flops_per_second": achieved,
        **({"model_flops_utilisation": achieved / peak[0]} if peak else {}),
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", default=["tiny", "small"], help="presets; default: tiny small"
    )
    parser.add_argument("--vocabulary", type=int, help="default: the model's usual one here")
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--length", type=int, help="tokens a sequence")
    parser.add_argument(
        "--compile", action="store_true", help="the trainer under torch.compile as well"
    )
    common_options(parser)


def common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="turns of every side")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU; default: 1")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: of this process, on a busy machine",
    )


if __name__ == "__main__":
    common.main("step", __doc__, measure, options)
