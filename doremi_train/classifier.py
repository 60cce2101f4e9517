"""A text classifier, small from scratch or any transformers encoder, and its training with importance-weighted losses.

Classifiers are many and small where language models are few and large: each is trained on one process, so the batch's
sums of `methods.importance` need no exchange here.

N examples, B of a batch, L ids of the longest one, C classes.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy  # each part is imported when it is first used
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from doremi_train.config import STRICT, Count, NonNegativeFloat, Positive, PositiveFloat, UserError
from doremi_train.data import tokenizer
from doremi_train.methods import importance

_BUCKETS = 1 << 15  # of hashed words and pairs of words
_VOCABULARY, _WIDTH, _LAYERS = 4096, 128, 2  # of an encoder from scratch


@dataclass(frozen=True, config=STRICT)
class Options:
    model: str = "ngrams"  # ngrams: logistic regression on words and pairs; encoder: a small transformer; or a folder
    length: Positive = 128  # tokens of a text that are read (of ngrams: words)
    epochs: Positive = 8
    least_steps: Count = 200  # a small set is passed over as often as these take
    batch_size: Positive = 128
    learning_rate: PositiveFloat = 0.03  # falls linearly to 0
    weight_decay: NonNegativeFloat = 0.01


class Table(NamedTuple):
    """Examples as a model reads them."""

    ids: Tensor  # (N, L) int64, 0 beyond the length
    length: Tensor  # (N,)
    label: Tensor  # (N,) int64

    def take(self, rows: NDArray[np.int64]) -> "Table":
        return Table(*(column[torch.from_numpy(rows)] for column in self))


class Kind(NamedTuple):
    """A family of models over the same ids."""

    encode: Callable[[Sequence[str]], list[list[int]]]
    build: Callable[[int], nn.Module]  # from classes; (ids (B, L), mask (B, L)) → logits (B, C)

    def table(self, texts: Sequence[str], labels: NDArray[np.int64]) -> Table:
        found = self.encode(texts)
        ids = torch.zeros(len(found), max(1, *(len(one) for one in found)), dtype=torch.int64)
        for row, one in enumerate(found):
            ids[row, : len(one)] = torch.tensor(one, dtype=torch.int64)
        return Table(ids, torch.tensor([len(one) for one in found]), torch.from_numpy(labels))


def kind(options: Options, texts: Sequence[str]) -> Kind:
    """The family of `options.model`; what it has to learn of the language first, such as a vocabulary, it learns from
    `texts`. Raises UserError where the model is neither known nor a folder that transformers loads."""
    if options.model == "ngrams":
        return Kind(lambda texts: [_ngrams(text, options.length) for text in texts], _Ngrams)
    if options.model == "encoder":
        return _small_encoder(options, texts)
    return _folder(options)


# ── Models ──────────────────────────────────────────────────────────────────────────


def _ngrams(text: str, length: int) -> list[int]:
    """Words and pairs of neighbouring words, hashed to 1 … _BUCKETS, each once."""
    words = text.lower().split()[:length]
    grams = dict.fromkeys([*words, *(f"{a} {b}" for a, b in pairwise(words))])
    return [zlib.crc32(gram.encode()) % _BUCKETS + 1 for gram in grams]


class _Ngrams(nn.Module):
    """Logistic regression on the n-grams that a text has, which together have length 1."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Embedding(_BUCKETS + 1, classes)
        nn.init.zeros_(self.weight.weight)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        scale = mask.sum(1, keepdim=True).clamp_min(1).rsqrt()
        return (self.weight(ids) * (mask * scale)[:, :, None]).sum(1) + self.bias


class _Transformer(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner(input_ids=ids, attention_mask=mask.long()).logits.float()


def _small_encoder(options: Options, texts: Sequence[str]) -> Kind:
    from transformers import BertConfig, BertForSequenceClassification

    learned = tokenizer.learn(texts, _VOCABULARY)  # id 0 ends a document: here it begins every text, and fills

    def build(classes: int) -> nn.Module:
        shape: dict[str, Any] = {
            "vocab_size": tokenizer.vocabulary_size(learned),
            "hidden_size": _WIDTH,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _WIDTH // 64,
            "intermediate_size": 4 * _WIDTH,
            "max_position_embeddings": options.length + 1,
            "num_labels": classes,
        }
        return _Transformer(BertForSequenceClassification(BertConfig(**shape)))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [[0, *ids[: options.length].tolist()] for ids in tokenizer.encode(learned, texts)]

    return Kind(encode, build)


def _folder(options: Options) -> Kind:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    folder = Path(options.model)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"classify.model={options.model!r}: must be ngrams, encoder, or a local transformers folder with "
            "config.json and safetensors"
        )
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    logging.set_verbosity_error()  # that a classifier's head is new is no news
    logging.disable_progress_bar()

    def build(classes: int) -> nn.Module:
        how = local | {"use_safetensors": True, "dtype": torch.float32, "num_labels": classes}
        return _Transformer(
            AutoModelForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **how)
        )

    try:
        words = AutoTokenizer.from_pretrained(folder, **local)
        build(2)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"classify.model={options.model!r}: not an encoder that transformers loads ({error})") from None

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return words(list(texts), truncation=True, max_length=options.length)["input_ids"]

    return Kind(encode, build)


# ── Training ────────────────────────────────────────────────────────────────────────


class Fitted(NamedTuple):
    model: nn.Module  # as after its best epoch
    epoch: int  # that one, from 1


def fit(
    kind: Kind,
    classes: int,
    table: Table,
    options: Options,
    weighting: importance.Options,
    seed: int,
    device: torch.device,
    reference: Tensor | None = None,
    validation: Table | None = None,
    watch: Callable[[dict[str, float]], None] = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train a new model; the best epoch is that of the highest validation accuracy, and of those the lowest loss.

    `reference` (N,) is the column that `weighting` reads: losses of the checker, or of imp its `log_ratio`. Without
    `validation` the last epoch counts. `watch` gets a line after every step, `check` is called after every epoch.
    """
    torch.manual_seed(seed)
    model = kind.build(classes).to(device)
    decay = options.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=decay, fused=True)
    state, step = importance.init(1, 0, weighting), 0
    in_epoch = math.ceil(len(table.label) / options.batch_size)
    epochs = max(options.epochs, math.ceil(options.least_steps / in_epoch))
    best, found, kept = (-1.0, 0.0), epochs, None
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in order(len(table.label), seed, epoch).split(options.batch_size):
            losses = _losses(model, table, rows, device)[:, None]  # (B, 1): a label is a sequence of one token
            column = None if reference is None else reference[rows, None].to(device)
            domain = torch.zeros(len(rows), dtype=torch.int64, device=device)
            stats = importance.observe(losses, column, domain, 1, weighting)
            stats = importance.Stats(*(part.cpu() for part in stats))
            state = importance.update(state, stats, weighting)
            weights = importance.weigh(state, domain, stats.tokens, weighting, losses, column)
            loss = (weights * losses).sum()
            optimizer.param_groups[0]["lr"] = options.learning_rate * (1 - step / (epochs * in_epoch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            watch(
                {
                    "step": step,
                    "loss": float(stats.loss / stats.tokens),
                    "effective_sample_size": float(state.effective),
                }
            )
        check()
        if validation is not None:
            logs = log_probabilities(model, validation, device)
            score = (accuracy(logs, validation.label), -float(_of_label(logs, validation.label).neg().mean()))
            if score > best:
                best, found = score, epoch
                kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if kept is not None:
        model.load_state_dict(kept)
    return Fitted(model.eval(), found)


def order(count: int, seed: int, epoch: int) -> Tensor:
    """(N,) the examples in the order of an epoch."""
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(mixed[0]) >> 1))


def _losses(model: nn.Module, table: Table, rows: Tensor, device: torch.device) -> Tensor:
    """(B,) nats."""
    logits = model(*_batch(table, rows, device))
    return nn.functional.cross_entropy(logits, table.label[rows].to(device), reduction="none")


def _batch(table: Table, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids (B, L), mask (B, L)), no wider than the longest of them."""
    length = table.length[rows]
    width = max(1, int(length.max()))
    ids = table.ids[rows, :width]
    mask = (torch.arange(width) < length[:, None]).float()
    return ids.to(device), mask.to(device)


@torch.no_grad()
def log_probabilities(model: nn.Module, table: Table, device: torch.device, batch: int = 256) -> Tensor:
    """(N, C) float64 on the host, the model in evaluation mode."""
    training = model.training
    model.eval()
    parts = [model(*_batch(table, rows, device)).double().cpu() for rows in torch.arange(len(table.label)).split(batch)]
    model.train(training)
    return torch.cat(parts).log_softmax(1)


# ── Checkers ────────────────────────────────────────────────────────────────────────


class Judged(NamedTuple):
    """What a checker says of every example."""

    loss: Tensor  # (N,) float64 nats of its label
    agrees: Tensor  # (N,) whether its label is the likeliest
    temperature: float


def judge(logs: Tensor, label: Tensor, temperature: float) -> Judged:
    """From log-probabilities (N, C), divided by the temperature."""
    scaled = (logs / temperature).log_softmax(1)
    return Judged(-_of_label(scaled, label), scaled.argmax(1) == label, temperature)


def temperature(logs: Tensor, label: Tensor) -> float:
    """That of the lowest loss on examples the model was not trained on; between 1/20 and 20."""

    def loss(logarithm: float) -> float:
        return float(judge(logs, label, math.exp(logarithm)).loss.mean())

    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=(-math.log(20), math.log(20)), method="bounded").x)


# ── Figures ─────────────────────────────────────────────────────────────────────────


def _of_label(logs: Tensor, label: Tensor) -> Tensor:
    """(N,)"""
    return logs.gather(1, label[:, None])[:, 0]


def accuracy(logs: Tensor, label: Tensor) -> float:
    return float((logs.argmax(1) == label).double().mean())


def macro_f1(logs: Tensor, label: Tensor) -> float:
    """The unweighted mean of F1 over classes that are there, or predicted."""
    classes, predicted = logs.shape[1], logs.argmax(1)
    hit = torch.bincount(label[predicted == label], minlength=classes).double()
    both = torch.bincount(label, minlength=classes) + torch.bincount(predicted, minlength=classes)
    return float((2 * hit / both.clamp_min(1))[both > 0].mean())


def calibration_error(logs: Tensor, label: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy − confidence| over bins of equal width, weighted by their size."""
    confidence, predicted = logs.exp().max(1)
    place = (confidence * bins).long().clamp_max(bins - 1)
    gap = (predicted == label).double() - confidence
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gap).abs().sum() / len(label))


def figures(logs: Tensor, label: Tensor) -> dict[str, float]:
    """Of test log-probabilities (N, C) against the labels (N,)."""
    return {
        "accuracy": accuracy(logs, label),
        "macro_f1": macro_f1(logs, label),
        "calibration_error": calibration_error(logs, label),
        "loss": -float(_of_label(logs, label).mean()),
    }
