"""LESS (`methods.less`), step by step: a warm-up, what its checkpoints say of every example, and a choice.

    warm-up      a part of the pool is trained on for a few epochs; each leaves parameters and AdamW's state
    scoring      cosines of every example's AdamW direction with the targets' gradients, at each checkpoint: exactly,
                 or by projected features that are kept, so that later targets cost nothing but their own gradients
    choice       the examples of the highest influence, beside those of the baselines
    fine-tuning  stage=finetune with the same keys trains on a choice

Each is done once in a store, whoever asks; any number of processes and commands on one store score the pool together.
The pool is the training split of data.*, read as stage=finetune reads it. With `selection.scorer_model` another model
warms up and scores; a choice is lines of files, so any model may be trained on it.

N examples of the pool, S subtasks of all targets together.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train import comm, files, model
from doremi_train.config import UserError, fingerprint
from doremi_train.console import Bar
from doremi_train.data import instructions
from doremi_train.data.instructions import Encoder, Instructions
from doremi_train.data.reading import BadLines, Source, records
from doremi_train.data.sources import resolve, signature
from doremi_train.methods import less
from doremi_train.runs import Run, stop
from doremi_train.selection import examples, influence
from doremi_train.selection.features import Rows, cosines
from doremi_train.selection.influence import Checkpoint, Coded
from doremi_train.stages import Session, finetune, less_report, select, warmup
from doremi_train.stages.warmup import Warm

SCORES = 1  # raise when the same request would give other scores
_SHARD = 512  # examples scored by one process at a time
_SHOWN = 5  # examples of each end in the result

Subtask = tuple[str, str]  # of a target


class Pool(NamedTuple):
    data: Instructions
    tokens: list[Coded]  # of every example
    places: list[tuple[str, int]]  # file and line
    domains: list[str]


def run(session: Session) -> Path:
    """The folder of the choices."""
    scorer = _scorer(session)
    key = "selection.scorer_model" if session.config.selection.scorer_model else "finetune.model"
    encoder = Encoder(str(scorer.config.finetune.model), key)
    pool = _pool(session, finetune.prepared(scorer, encoder))
    served = _served(session, encoder) if session.config.selection.targets else {}
    warm = warmup.run(scorer, pool.data)
    choice = Run(session.store, "selection", _recipe(session, warm, served))
    if not choice.finished:
        scores = _influences(scorer, warm, pool, served)
    if not served:
        session.say("select                 the features are in the store; give selection.targets to choose by them")
        return session.store
    with session.computing(choice, "select") as todo:
        if todo:
            comm.on_first(lambda: choice.finish(_choose(scorer, choice.folder, pool, served, scores)))
    if session.config.stage == "select":
        session.say(_summary(choice.result(), choice.folder))
        comm.on_first(lambda: less_report.write(session.run_dir / "report.html", choice.result()))
    return choice.folder


def _scorer(session: Session) -> Session:
    """The same with the model that warms up and scores in the place of the one that is trained in the end."""
    options, tuned = session.config.selection, session.config.finetune
    folder = options.scorer_model or tuned.model
    if folder is None:
        raise UserError("finetune.model: missing; give the local transformers folder that is to be fine-tuned")
    if session.config.training.optimizer != "adamw":
        raise UserError(
            f"training.optimizer={session.config.training.optimizer}: selection=less follows AdamW's steps; take adamw"
        )
    return replace(session, config=replace(session.config, finetune=replace(tuned, model=folder)))


# ── Pool and targets ────────────────────────────────────────────────────────────────


def _pool(session: Session, data: Instructions) -> Pool:
    """The training examples, by domain, file and line."""
    counts = data.sequences("train", session.config.training.sequence_length)
    where = [(k, n) for k, count in enumerate(counts.tolist()) for n in range(count)]
    found = [data.example("train", k, n) for k, n in where]
    tokens = [np.where(example.carries, example.ids, ~example.ids) for example in found]
    return Pool(data, tokens, [data.place("train", k, n) for k, n in where], [data.domains[k] for k, _ in where])


def _served(session: Session, encoder: Encoder) -> dict[Subtask, list[tuple[Coded, bytes]]]:
    """The examples of every subtask, and their text. Raises UserError for a target that has none to be used."""
    length = session.config.training.sequence_length
    served: dict[Subtask, list[tuple[Coded, bytes]]] = {}
    for name, sources in select.targets(session).items():
        for place, record in _records(session, sources):
            tokens = instructions.coded(encoder.encode(record, place), length)
            if (tokens >= 0).any():
                served.setdefault((name, str(record.get("subtask", ""))), []).append((tokens, examples.text(record)))
        if name not in {target for target, _ in served}:
            raise UserError(
                f"selection.targets.{name}: no example whose answer lies within training.sequence_length={length}; "
                "give some, or raise it"
            )
    return served


def _records(session: Session, sources: Sequence[Source]) -> Any:
    options = select.text_options(session)
    for source in sources:
        for _, line, record in records(source, options, BadLines(options)):
            yield f"{source.url}, line {line}", record


# ── Scoring ─────────────────────────────────────────────────────────────────────────


def _influences(session: Session, warm: Warm, pool: Pool, served: Mapping[Subtask, Any]) -> NDArray[np.float64]:
    """(N, S), computed by all processes together."""
    options = session.config.selection.less
    numbers = asdict(less.Options(options.epsilon, options.bias_correction, options.cosine))
    recipe = {"scores": SCORES, "warmup": warm.address, "direction": numbers}
    kind = options.features or (None if served else "int8")
    if kind is not None:
        del numbers["cosine"]  # which is the targets' business
        recipe |= {"dimension": options.dimension, "seed": options.projection_seed}
    else:
        recipe |= {"targets": _printed(served)}
    home, epochs = session.store / "selection" / f"less-{fingerprint(recipe)}", len(warm.rates)
    count, world, found = len(pool.tokens), comm.world(), []
    with Bar("select: scoring", epochs * count, unit="examples", show=world.first) as bar:
        for epoch in range(1, epochs + 1):
            scored = _Scored(session, warm, epoch, pool, served)
            work, width = (scored.features, options.dimension) if kind else (scored.cosines, len(served))
            folder = home / f"epoch-{epoch}"
            rows = Rows(folder, recipe | {"epoch": epoch}, count, width, kind or "float64", _SHARD)
            rows.fill(work, world.rank * rows.shards // world.size, partial(_look, bar, (epoch - 1) * count))
            if served:
                shards = (rows.read(number) for number in range(rows.shards))
                found += [np.concatenate([cosines(s, scored.target_features) if kind else s for s in shards])]
    if not found:
        return np.zeros((count, 0))
    return less.influence(torch.from_numpy(np.stack(found)), torch.tensor(warm.rates)).numpy()


def _look(bar: Bar, before: int, done: int) -> None:
    stop.check("select")
    bar.update(before + done)


class _Scored:
    """What one checkpoint says; it is loaded when it is first asked."""

    def __init__(self, session: Session, warm: Warm, epoch: int, pool: Pool, served: Mapping[Subtask, Any]) -> None:
        self._session, self._warm, self._epoch, self._pool, self._served = session, warm, epoch, pool, served
        self._options, self._device = session.config.selection.less, session.place.device

    def cosines(self, rows: slice) -> NDArray[np.floating]:
        return self._each(rows, lambda batch: influence.cosines(self._at, batch, self._targets, self._options))

    def features(self, rows: slice) -> NDArray[np.floating]:
        size, seed = self._options.dimension, self._options.projection_seed
        return self._each(rows, lambda batch: influence.features(self._at, batch, size, seed, self._options))

    @functools.cached_property
    def target_features(self) -> NDArray[np.floating]:
        """(S, k) of lengths that are right on average."""
        size, seed = self._options.dimension, self._options.projection_seed
        return torch.stack([influence.feature(target, size, seed) for target in self._targets]).cpu().numpy()

    @functools.cached_property
    def _at(self) -> Checkpoint:
        return self._warm.load(self._epoch)

    @functools.cached_property
    def _targets(self) -> list[dict[str, Tensor]]:
        found = []
        for subtask in self._served.values():
            tokens = [tokens for tokens, _ in subtask]
            together = influence.batches(tokens, _together(self._session), self._device)
            found.append(influence.target(self._at.model, (batch for _, batch in together), self._options))
        return found

    def _each(self, rows: slice, work: Any) -> NDArray[np.floating]:
        some = self._pool.tokens[rows]
        found: list[Any] = [None] * len(some)
        for numbers, batch in influence.batches(some, _together(self._session), self._device):
            for number, row in zip(numbers, work(batch).cpu().numpy(), strict=True):
                found[number] = row
        return np.stack(found)


def _together(session: Session) -> int:
    return session.config.selection.less.batch_tokens or (512 if session.place.device.type == "cpu" else 8192)


def _printed(served: Mapping[Subtask, Any]) -> list[Any]:
    return [[*subtask, fingerprint([tokens.tolist() for tokens, _ in found])] for subtask, found in served.items()]


# ── Choice ──────────────────────────────────────────────────────────────────────────


def _recipe(session: Session, warm: Warm, served: Mapping[Subtask, Any]) -> dict[str, Any]:
    """Everything that decides the choice."""
    options = session.config.selection
    given = {
        key: value for key, value in asdict(options.less).items() if key not in ("train_on", "test", "batch_tokens")
    }
    return {
        "scores": SCORES,
        "warmup": warm.address,
        "less": given,
        "budget": list(options.budget),
        "files": signature(session.config.data, resolve(session.config.data)),
        "targets": _printed(served),
        "seed": session.config.seed,
    }


def _choose(
    session: Session, folder: Path, pool: Pool, served: Mapping[Subtask, Any], influences: NDArray[np.float64]
) -> dict[str, Any]:
    """Write every method's choice for every target. The content of `result.json`."""
    first: dict[bytes, int] = {}
    copy_of = [first.setdefault(tokens.tobytes(), number) for number, tokens in enumerate(pool.tokens)]
    texts = _texts(session, pool)
    orders = _Orders(session, pool, [examples.text(record) for record in texts], served)
    targets = {}
    for name in dict.fromkeys(target for target, _ in served):
        columns = [column for column, (target, _) in enumerate(served) if target == name]
        scores = less.score(torch.from_numpy(influences[:, columns]))
        ranked = {"less": less.top(scores, len(scores)).tolist()} | orders.of(name)
        picks = {
            method: _budgeted(session, [n for n in order if copy_of[n] == n], pool) for method, order in ranked.items()
        } | {"all": list(range(len(pool.tokens)))}
        for method, picked in picks.items():
            lines = b"".join(orjson.dumps(texts[n]) + b"\n" for n in picked)
            files.write_bytes(folder / name / f"{method}.jsonl", lines)
        _write_scores(folder / name / "scores.parquet", pool, copy_of, scores.numpy(), picks)
        targets[name] = _described(name, pool, texts, served, scores.numpy(), ranked["less"], picks)
    empty = pool.data.manifest["without_loss"]
    return {
        "examples": len(pool.tokens),
        "without_loss": empty,
        "copies": len(pool.tokens) - len(first),
        "without_score": int((~np.isfinite(influences)).any(1).sum()),
        "seed": session.config.seed,
        "targets": targets,
    }


class _Orders:
    """The pool as the baselines order it, best first."""

    def __init__(self, session: Session, pool: Pool, texts: list[bytes], served: Mapping[Subtask, Any]) -> None:
        self._session, self._served, self._methods = session, served, session.config.selection.less.baselines
        self._count = len(pool.tokens)
        by_target: dict[str, list[bytes]] = {}
        for (target, _), found in served.items():
            by_target.setdefault(target, []).extend(text for _, text in found)
        self._targets = list(by_target)
        self._words = {
            method: examples.by_words(method, texts, by_target)
            for method in ("bm25", "ngram")
            if method in self._methods
        }
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        if {"rds", "rds_plus"} & set(self._methods):
            inner = model.read(Path(str(session.config.finetune.model)), "finetune.model")
            every = [tokens for found in served.values() for tokens, _ in found]
            look = partial(examples.representations, inner, tokens=_together(session), device=session.place.device)
            own, theirs = look(examples=pool.tokens), look(examples=every)
            self._seen = {name: (own[name], theirs[name]) for name in own}

    def of(self, target: str) -> dict[str, list[int]]:
        return {method: self._order(method, target) for method in self._methods}

    def _order(self, method: str, target: str) -> list[int]:
        seed = self._session.config.seed
        if method == "random":
            return np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(self._count).tolist()
        if method in self._words:
            scores = self._words[method][:, self._targets.index(target)]
            scores = examples.resampled(scores, seed) if method == "ngram" else scores
            return np.argsort(-scores, kind="stable").tolist()
        own, theirs = self._seen[method]
        of = np.repeat([t == target for t, _ in self._served], [len(found) for found in self._served.values()])
        met = (own @ theirs[torch.from_numpy(of)].T).numpy()  # (N, V)
        if method == "rds_plus":
            return examples.round_robin(met, self._count)
        names = np.repeat(
            [subtask for t, subtask in self._served if t == target],
            [len(found) for (t, _), found in self._served.items() if t == target],
        )
        best = np.max([met[:, names == name].mean(1) for name in dict.fromkeys(names.tolist())], 0)
        return np.argsort(-best, kind="stable").tolist()


def _budgeted(session: Session, order: Sequence[int], pool: Pool) -> list[int]:
    """The first of them, as many as the budget allows."""
    unit, most = session.config.selection.budget
    assert isinstance(most, int | float)
    if unit == "tokens":
        total = np.cumsum([len(pool.tokens[n]) for n in order])
        return list(order[: int(np.searchsorted(total, most, side="right"))])
    return list(order[: max(1, round(most * len(pool.tokens))) if unit == "fraction" else int(most)])


def _texts(session: Session, pool: Pool) -> list[dict[str, Any]]:
    """The record of every example."""
    data = session.config.data
    wanted = {place: number for number, place in enumerate(pool.places)}
    found: dict[int, dict[str, Any]] = {}
    for source in resolve(data):
        for _, line, record in records(source, data, BadLines(data)):
            if (source.url, line) in wanted:
                found[wanted[source.url, line]] = record
    return [found[number] for number in range(len(pool.places))]


def _write_scores(
    path: Path, pool: Pool, copy_of: list[int], scores: NDArray[np.float64], picks: Mapping[str, list[int]]
) -> None:
    columns: dict[str, Any] = {
        "file": [file for file, _ in pool.places],
        "line": [line for _, line in pool.places],
        "domain": pool.domains,
        "tokens": [len(tokens) for tokens in pool.tokens],
        "copy_of": copy_of,
        "score": scores,
    }
    for method, picked in picks.items():
        mark = np.zeros(len(pool.tokens), bool)
        mark[picked] = True
        columns[method] = mark
    with files.replacing(path) as aside:
        pq.write_table(pa.table(columns), aside, compression="zstd")


def _described(
    name: str, pool: Pool, texts: list[dict[str, Any]], served: Mapping[Subtask, Any], scores: NDArray[np.float64],
    ranked: list[int], picks: Mapping[str, list[int]],
) -> dict[str, Any]:  # fmt: skip
    def shown(number: int) -> dict[str, Any]:
        file, line = pool.places[number]
        said = examples.text(texts[number]).decode()
        return {
            "score": float(scores[number]),
            "file": file,
            "line": line,
            "domain": pool.domains[number],
            "text": said,
        }

    known = scores[np.isfinite(scores)]
    counts, edges = np.histogram(known, bins=40) if len(known) else (np.zeros(0), np.zeros(0))
    return {
        "subtasks": {subtask: len(found) for (target, subtask), found in served.items() if target == name},
        "methods": {
            method: {
                "examples": len(picked),
                "tokens": sum(len(pool.tokens[n]) for n in picked),
                "domains": dict(Counter(pool.domains[n] for n in picked).most_common()),
                "shared": {other: len(set(picked) & set(theirs)) for other, theirs in picks.items()},
            }
            for method, picked in picks.items()
        },
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "top": [shown(n) for n in ranked[:_SHOWN]],
        "bottom": [shown(n) for n in ranked[::-1][:_SHOWN]],
    }


def _summary(result: Mapping[str, Any], folder: Path) -> str:
    empty = result["without_loss"]
    lines = [
        f"pool {result['examples']} examples; left out {empty['examples']} without a token that carries a loss"
        + (f" (such as {empty['first'][0]})" if empty["examples"] else "")
        + f", {result['copies']} copies of others, {result['without_score']} without a score"
    ]
    for name, part in result["targets"].items():
        lines += ["", f"{name}: by {sum(part['subtasks'].values())} examples of {len(part['subtasks'])} subtasks"]
        for method, found in part["methods"].items():
            mine = part["methods"]["less"]["shared"][method] / max(part["methods"]["less"]["examples"], 1)
            shared = "" if method in ("less", "all") else f", {mine:.1%} of what less takes"
            lines.append(f"  {method:<9} {found['examples']} examples, {found['tokens']} tokens{shared}")
        lines += [f"  {end:<6} {one['text'][:90]!r}" for end in ("top", "bottom") for one in part[end][:3]]
    return "\n".join([*lines, "", f"choices: {folder}"])
