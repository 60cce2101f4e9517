"""Five tasks that only what they ask for tells apart: prompts of random letters, each answered by
its own cipher.

A task replaces every letter by another one, by a permutation of the alphabet that no other task
agrees with on any letter. Prompts and answers of all tasks have the same letters, equally often and
in no order, and only letters that stand far apart belong together, so that words and pairs of words
say nothing. A part of the answers is random: noise.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

LETTERS = "abcdefghijkl"
TASKS = ("amber", "birch", "cedar", "drift", "ember")
LENGTH = 6  # letters of a prompt


def records(
    seed: int, count: int, noise: float, tasks: tuple[str, ...] = TASKS
) -> list[dict[str, Any]]:
    """`count` examples of each task, in random order; `clean` says which answers are right."""
    random = np.random.default_rng(seed)
    ciphers = _ciphers()
    examples = []
    for task in tasks:
        for _ in range(count):
            asked = random.integers(0, len(LETTERS), LENGTH)
            clean = bool(random.random() >= noise)
            answer = ciphers[task][asked] if clean else random.integers(0, len(LETTERS), LENGTH)
            prompt, completion = (" ".join(LETTERS[n] for n in some) for some in (asked, answer))
            examples.append(
                {"prompt": prompt, "completion": completion, "task": task, "clean": clean}
            )
    return [examples[n] for n in random.permutation(len(examples))]


def _ciphers() -> dict[str, Any]:
    """Shifts of one shuffled alphabet: permutations that differ on every letter."""
    shuffled = np.random.default_rng(0).permutation(len(LETTERS))
    return {task: (shuffled + 2 * n + 1) % len(LETTERS) for n, task in enumerate(TASKS)}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def untrained(folder: Path, width: int = 64, layers: int = 1) -> Path:
    """A transformers folder with a tokeniser of the letters and a small model that has learned
    nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(["<end>", *LETTERS])}, unk_token="<end>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(LETTERS) + 1, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=4, bos_token_id=0, eos_token_id=0,
        pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


TRAINING = (
    "data.embedded=null", "finetune.lora.rank=null", "training.threads=1",
    "training.sequence_length=12",
    "evaluation.sequences=64",
)  # fmt: skip


def pretrained(command: Callable[..., Any], folder: Path, width: int, steps: int = 700) -> Path:
    """A model folder after training on other examples of all tasks, without noise. `command` runs
    doremi-train."""
    write(folder / "train.jsonl", records(3, 2000, 0.0))
    write(folder / "held.jsonl", records(2, 20, 0.0))
    outcome = command(
        *(
            "stage=finetune",
            f"run_dir={folder}/run",
            f"finetune.model={untrained(folder / 'untrained', width)}",
        ),
        *(
            *TRAINING,
            "training.batch_size=64",
            f"training.steps={steps}",
            "training.learning_rate=0.003",
        ),
        f"data.domains={{all: {{train: [{folder}/train.jsonl], "
        f"validation: [{folder}/held.jsonl]}}}}",
    )
    assert outcome.code == 0, outcome
    return folder / "run/finetune/model"


def selecting(folder: Path, base: Path, count: int = 200) -> list[str]:
    """Overrides that select from a pool with `count` examples of each task, a fifth of them noise,
    for every task."""
    write(folder / "pool.jsonl", records(1, count, 0.2))
    write(folder / "held.jsonl", records(2, 20, 0.0))
    for task in TASKS:
        write(folder / f"target/{task}.jsonl", records(4, 64, 0.0, (task,)))
        write(folder / f"test/{task}.jsonl", records(5, 64, 0.0, (task,)))
    return [
        *("selection=less", f"finetune.model={base}", *TRAINING, "training.batch_size=16"),
        *("training.schedule=constant", "training.learning_rate=0.003"),
        f"data.domains={{pool: {{train: [{folder}/pool.jsonl], "
        f"validation: [{folder}/held.jsonl]}}}}",
        "selection.targets={"
        + ", ".join(f"{task}: [{folder}/target/{task}.jsonl]" for task in TASKS)
        + "}",
    ]


def recovered(
    command: Callable[..., Any], folder: Path, base: Path, *overrides: str
) -> dict[str, dict[str, float]]:
    """{task: {method: part of its choice that is of that task and clean}}."""
    outcome = command("stage=select", f"run_dir={folder}/run", *selecting(folder, base), *overrides)
    assert outcome.code == 0, outcome
    return {task: precision(folder / "run/select" / task, task) for task in TASKS}


def precision(choices: Path, task: str) -> dict[str, float]:
    parts = {}
    for path in sorted(choices.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        parts[path.stem] = sum(line["task"] == task and line["clean"] for line in lines) / len(
            lines
        )
    return parts
