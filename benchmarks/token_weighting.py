"""How RHO, DIMP and IMP weigh the tokens of documents that contain noise, and what that does to
held-out loss.

Spans of characters inside training documents are shuffled; validation text stays clean. A reference
is trained on the clean text, then a model with every policy and seed on the noisy one. Noise tokens
are known by where they stand in their document, so the part of the weight that falls on clean ones
can be counted.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
import zstandard
from tokenizers import Tokenizer

from benchmarks import common
from doremi_train import files
from doremi_train.data.corpus import installed
from doremi_train.evaluation.statistics import student_t
from doremi_train.methods import importance
from doremi_train.model import birth, folders

POLICIES = ("none", "rho", "dimp", "imp")
SPAN, NOISE = 200, 0.1  # characters shuffled together; part of the characters
CHARACTERS = 600_000  # of each domain and split, at most
LENGTH, SEQUENCES = 128, 512  # that are looked at
HOW = (
    "model=nano", "mixture=natural", "main.comparisons=[]", "training.threads=1",
    "training.batch_size=16", "training.learning_rate=0.006", "training.end_learning_rate=0.0006",
    "evaluation.sequences=16",
)  # fmt: skip

Spans = list[tuple[int, int]]


def shuffled(text: str, generator: random.Random) -> tuple[str, Spans]:
    """The text with about NOISE of its spans shuffled, and where those stand."""
    characters, spans = list(text), []
    for start in range(0, len(text), SPAN):
        if generator.random() < NOISE:
            part = characters[start : start + SPAN]
            generator.shuffle(part)
            characters[start : start + SPAN] = part
            spans.append((start, start + len(part)))
    return "".join(characters), spans


def documents(corpus: Path | None, domain: str, split: str) -> Iterator[str]:
    """Documents of a corpus with a folder a domain, or of the text that every machine with this
    package has."""
    left = CHARACTERS
    for text in _texts(corpus, domain, split):
        yield text
        left -= len(text)
        if left <= 0:
            return


def _texts(corpus: Path | None, domain: str, split: str) -> Iterator[str]:
    if corpus is None:
        yield from (text for _, text in installed.texts(installed.listing(domain, split, 0.05)))
        return
    for path in sorted((corpus / domain).glob(f"{split}*.jsonl.zst")):
        with path.open("rb") as raw:
            for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), "utf-8"):
                yield json.loads(line)["text"]


def write(corpus: Path | None, out: Path) -> None:
    """Write OUT/clean and OUT/noisy, and OUT/spans.jsonl: noisy documents with the places of their
    noise."""
    domains = (
        installed.domains()
        if corpus is None
        else sorted(path.name for path in corpus.iterdir() if path.is_dir())
    )
    with (out / "spans.jsonl").open("w") as kept:
        for domain in domains:
            generator = random.Random(domain)
            for split in ("train", "validation"):
                for kind in ("clean", "noisy"):
                    (out / kind / domain).mkdir(parents=True, exist_ok=True)
                clean, noisy = (
                    (out / kind / domain / f"{split}.jsonl").open("w")
                    for kind in ("clean", "noisy")
                )
                with clean, noisy:
                    for text in documents(corpus, domain, split):
                        changed, spans = (
                            shuffled(text, generator) if split == "train" else (text, [])
                        )
                        clean.write(json.dumps({"text": text}) + "\n")
                        noisy.write(json.dumps({"text": changed}) + "\n")
                        if split == "train":
                            kept.write(json.dumps({"text": changed, "spans": spans}) + "\n")


def train(*overrides: str) -> None:
    subprocess.run([sys.executable, "-m", "doremi_train", *overrides], check=True)


def sequences(out: Path, tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (N, T + 1) of noisy training documents, and whether each target (N, T) touches
    noise."""
    tokens, noise, generator = [], [], random.Random(0)
    lines = (out / "spans.jsonl").read_text().splitlines()
    for line in generator.sample(lines, min(len(lines), 400)):
        document = json.loads(line)
        encoded = tokenizer.encode(document["text"], add_special_tokens=False)
        marked = np.zeros(len(document["text"]) + 1, dtype=bool)
        for start, end in document["spans"]:
            marked[start:end] = True
        ids, offsets = encoded.ids, encoded.offsets  # each is made anew when it is asked for
        for start in range(0, len(ids) - LENGTH, LENGTH):
            tokens.append(ids[start : start + LENGTH + 1])
            noise.append(
                [bool(marked[a:b].any()) for a, b in offsets[start + 1 : start + LENGTH + 1]]
            )
    chosen = generator.sample(range(len(tokens)), SEQUENCES)
    return torch.tensor([tokens[i] for i in chosen]), torch.tensor([noise[i] for i in chosen])


@torch.no_grad()
def losses(folder: Path, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Losses (N, T) in nats."""
    loaded = folders.load(folder, vocabulary, "model").eval()
    birth.fill(loaded, torch.device("cpu"))
    return torch.cat([loaded(part) for part in tokens.split(32)])


def clean_mass(
    policy: Any, run: Path, reference: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor
) -> float:
    """Part of the weight that falls on clean tokens, in batches of 32, with the trained model as it
    is at the end."""
    vocabulary = int(files.read_json(run / "main" / "model" / "config.json")["vocab_size"])
    own, column = losses(run / "main" / "model", tokens, vocabulary), reference
    if policy == "imp":
        column = importance.log_ratio(
            reference, losses(run / "data_model" / "model", tokens, vocabulary)
        )
    options = importance.Options(**asdict(importance.Weighting()), policy=policy)
    batches = []
    for rows in torch.arange(len(tokens)).split(32):
        domain = torch.zeros(len(rows), dtype=torch.int64)
        stats = importance.observe(own[rows], column[rows], domain, 1, options)
        state = importance.update(importance.init(1, 1, options), stats, options)
        batches.append(
            importance.weigh(state, domain, stats.tokens, options, own[rows], column[rows])
        )
    weights = torch.cat(batches)
    return float(weights[~noise].sum() / weights.sum())


def shown(values: list[float]) -> str:
    mean, half = student_t(values)
    return f"{mean:.4f} ± {half:.4f}"


def measure(given: argparse.Namespace) -> common.Result:
    with tempfile.TemporaryDirectory() as folder:
        return _measure(given, Path(folder))


def _measure(given: argparse.Namespace, out: Path) -> common.Result:
    write(given.corpus, out)
    seeds, steps = (range(2), 20) if given.quick else (range(3), 150)
    shared = [
        *HOW,
        f"training.steps={steps}",
        f"evaluation.every={steps}",
        f"store={out / 'store'}",
    ]
    longer = f"training.steps={given.reference_steps or 4 * steps}"
    train(
        *shared,
        f"data.root={out / 'clean'}",
        f"run_dir={out / 'clean-run'}",
        "stage=reference",
        longer,
    )
    tokenizer = out / "clean-run" / "prepare" / "tokenizer.json"
    reference = out / "clean-run" / "reference" / "model"
    train(
        "-m", *shared, f"data.root={out / 'noisy'}", f"data.tokenizer={tokenizer}",
        f"reference.path={reference}", f"run_dir={out / 'runs'}",
        f"training.loss_weighting={','.join(POLICIES)}", f"seed={','.join(map(str, seeds))}",
    )  # fmt: skip
    runs = {}
    for path in (out / "runs").glob("*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        runs[config["training"]["loss_weighting"], config["seed"]] = path.parent
    tokens, noise = sequences(out, Tokenizer.from_file(str(tokenizer)))
    vocabulary = int(files.read_json(reference / "config.json")["vocab_size"])
    frozen = losses(reference, tokens, vocabulary)
    figures: dict[str, Any] = {"noise tokens": float(noise.float().mean())}
    rows: list[tuple[object, ...]] = []
    for policy in POLICIES:
        held_out = [
            files.read_json(runs[policy, seed] / "evaluation.json")["main"]["mean_loss"]
            for seed in seeds
        ]
        mass = [clean_mass(policy, runs[policy, seed], frozen, tokens, noise) for seed in seeds]
        figures[policy] = {"held-out loss": held_out, "weight on clean tokens": mass}
        less = [a - b for a, b in zip(figures["none"]["held-out loss"], held_out, strict=True)]
        rows.append((policy, shown(held_out), shown(less) if policy != "none" else "", shown(mass)))
    columns = ("policy", "held-out loss, nats", "less than none, paired", "weight on clean tokens")
    common.table(f"{figures['noise tokens']:.1%} of the training tokens are noise", columns, rows)
    return common.Result({}, figures)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference-steps",
        type=int,
        help="of the reference; default: four times those of the others",
    )
    parser.add_argument(
        "--corpus", type=Path, help="a folder a domain, with train* and validation*.jsonl.zst in it"
    )


if __name__ == "__main__":
    common.main("token_weighting", __doc__, measure, options)
