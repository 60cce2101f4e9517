"""The choice of LESS and of its baselines: the first of an order, as many as the budget allows.

N examples of the pool, S subtasks of all targets together, V examples of the targets.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from doremi_train import files
from doremi_train.data.instructions import Instructions, Picked
from doremi_train.methods import less
from doremi_train.model import folders
from doremi_train.selection.examples import baselines
from doremi_train.stages.choice import less_pool
from doremi_train.stages.choice.less_pool import Pool, Subtask
from doremi_train.stages.session import Session

_SHOWN = 5  # examples of each end in the result


def choose(
    session: Session,
    folder: Path,
    pool: Pool,
    served: Mapping[Subtask, Any],
    influences: NDArray[np.float64],
) -> dict[str, Any]:
    """Write every method's choice for every target. The content of `result.json`."""
    first: dict[bytes, int] = {}
    copy_of = [
        first.setdefault(tokens.tobytes(), number) for number, tokens in enumerate(pool.tokens)
    ]
    records = pool.data.records()
    texts = [baselines.text(orjson.loads(record)) for record in records]
    orders = _Orders(session, pool, texts, served)
    targets = {}
    for name in dict.fromkeys(target for target, _ in served):
        columns = [column for column, (target, _) in enumerate(served) if target == name]
        scores = less.score(torch.from_numpy(influences[:, columns]))
        ranked = {"less": less.top(scores, len(scores)).tolist()} | orders.of(name)
        picks = {
            method: _budgeted(session, [n for n in order if copy_of[n] == n], pool)
            for method, order in ranked.items()
        } | {"all": list(range(len(pool.tokens)))}
        for method, picked in picks.items():
            lines = b"".join(records[n] for n in picked)
            files.write_bytes(folder / name / f"{method}.jsonl", lines)
        numbers = orjson.dumps({"pool": pool.data.fingerprint, "examples": picks})
        files.write_bytes(folder / name / "picks.json", numbers)
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

    def __init__(
        self, session: Session, pool: Pool, texts: list[bytes], served: Mapping[Subtask, Any]
    ) -> None:
        self._session, self._served, self._methods = (
            session,
            served,
            session.config.selection.less.baselines,
        )
        self._count = len(pool.tokens)
        by_target: dict[str, list[bytes]] = {}
        for (target, _), examples in served.items():
            by_target.setdefault(target, []).extend(text for _, text in examples)
        self._targets = list(by_target)
        self._words = {
            method: baselines.by_words(method, texts, by_target)
            for method in ("bm25", "ngram")
            if method in self._methods
        }
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        if {"rds", "rds_plus"} & set(self._methods):
            inner = folders.read(Path(str(session.config.finetune.model)), "finetune.model")
            every = [tokens for examples in served.values() for tokens, _ in examples]
            look = partial(
                baselines.representations,
                inner,
                tokens=less_pool.tokens_at_once(session),
                device=session.place.device,
            )
            own, theirs = look(examples=pool.tokens), look(examples=every)
            self._seen = {name: (own[name], theirs[name]) for name in own}

    def of(self, target: str) -> dict[str, list[int]]:
        return {method: self._order(method, target) for method in self._methods}

    def _order(self, method: str, target: str) -> list[int]:
        seed = self._session.config.seed
        if method == "random":
            return (
                np.random.Generator(np.random.Philox(key=[seed, 1]))
                .permutation(self._count)
                .tolist()
            )
        if method in self._words:
            scores = self._words[method][:, self._targets.index(target)]
            scores = baselines.resampled(scores, seed) if method == "ngram" else scores
            return np.argsort(-scores, kind="stable").tolist()
        own, theirs = self._seen[method]
        mine = np.repeat(
            [t == target for t, _ in self._served],
            [len(examples) for examples in self._served.values()],
        )
        cosines = (own @ theirs[torch.from_numpy(mine)].T).numpy()  # (N, V)
        if method == "rds_plus":
            return baselines.round_robin(cosines, self._count)
        names = np.repeat(
            [subtask for t, subtask in self._served if t == target],
            [len(examples) for (t, _), examples in self._served.items() if t == target],
        )
        best = np.max(
            [cosines[:, names == name].mean(1) for name in dict.fromkeys(names.tolist())], 0
        )
        return np.argsort(-best, kind="stable").tolist()


def _budgeted(session: Session, order: Sequence[int], pool: Pool) -> list[int]:
    """The first of them, as many as the budget allows."""
    unit, most = session.config.selection.budget
    assert isinstance(most, int | float)
    if unit == "tokens":
        total = np.cumsum([len(pool.tokens[n]) for n in order])
        return list(order[: int(np.searchsorted(total, most, side="right"))])
    return list(
        order[: max(1, round(most * len(pool.tokens))) if unit == "fraction" else int(most)]
    )


def picked(folder: Path, method: str, pool: Instructions) -> Picked | None:
    """A method's choice for a target, of which this is the folder, as examples of the pool. None
    where it was made of another pool, or before their numbers were kept."""
    path = folder / "picks.json"
    if not path.exists():
        return None
    kept = files.read_json(path)
    return Picked(pool, kept["examples"][method]) if kept["pool"] == pool.fingerprint else None


def _write_scores(
    path: Path,
    pool: Pool,
    copy_of: list[int],
    scores: NDArray[np.float64],
    picks: Mapping[str, list[int]],
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
    name: str,
    pool: Pool,
    texts: list[bytes],
    served: Mapping[Subtask, Any],
    scores: NDArray[np.float64],
    ranked: list[int],
    picks: Mapping[str, list[int]],
) -> dict[str, Any]:
    def shown(number: int) -> dict[str, Any]:
        file, line = pool.places[number]
        return {
            "score": float(scores[number]),
            "file": file,
            "line": line,
            "domain": pool.domains[number],
            "text": texts[number].decode(),
        }

    known = scores[np.isfinite(scores)]
    counts, edges = np.histogram(known, bins=40) if len(known) else (np.zeros(0), np.zeros(0))
    return {
        "subtasks": {
            subtask: len(examples)
            for (target, subtask), examples in served.items()
            if target == name
        },
        "methods": {
            method: {
                "examples": len(picked),
                "tokens": sum(len(pool.tokens[n]) for n in picked),
                "domains": dict(Counter(pool.domains[n] for n in picked).most_common()),
                "shared": {
                    other: len(set(picked) & set(theirs)) for other, theirs in picks.items()
                },
            }
            for method, picked in picks.items()
        },
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "top": [shown(n) for n in ranked[:_SHOWN]],
        "bottom": [shown(n) for n in ranked[::-1][:_SHOWN]],
    }


def summary(result: Mapping[str, Any], folder: Path) -> list[str]:
    empty = result["without_loss"]
    lines = [
        f"pool {result['examples']} examples; left out {empty['examples']} without a token that "
        "carries a loss"
        + (f" (such as {empty['first'][0]})" if empty["examples"] else "")
        + f", {result['copies']} copies of others, {result['without_score']} without a score"
    ]
    for name, part in result["targets"].items():
        lines += [
            "",
            f"{name}: by {sum(part['subtasks'].values())} examples of "
            f"{len(part['subtasks'])} subtasks",
        ]
        for method, chosen in part["methods"].items():
            mine = part["methods"]["less"]["shared"][method] / max(
                part["methods"]["less"]["examples"], 1
            )
            shared = "" if method in ("less", "all") else f", {mine:.1%} of what less takes"
            lines.append(
                f"  {method:<9} {chosen['examples']} examples, {chosen['tokens']} tokens{shared}"
            )
        lines += [
            f"  {end:<6} {example['text'][:90]!r}"
            for end in ("top", "bottom")
            for example in part[end][:3]
        ]
    return [*lines, "", f"choices: {folder}"]
