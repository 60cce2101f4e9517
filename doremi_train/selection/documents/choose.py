"""A choice by scores: where the budget ends, by sums over files that are read one after the other.

N parts, G groups with a budget of their own (the whole corpus, or every domain), K domains.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from doremi_train.config import UserError
from doremi_train.files import replacing
from doremi_train.methods import ngram
from doremi_train.selection.documents.tasks import BENCHMARK, COPY, ELIGIBLE, SHORT
from doremi_train.selection.options import SelectionOptions

REFUSED = {SHORT: "short", COPY: "copy", BENCHMARK: "benchmark"}
LENGTHS = 24  # powers of two


@dataclass(frozen=True)
class Scores:
    """The scores of a corpus, a file for every source."""

    files: list[Path]
    shards: list[str]  # names of the sources
    copies: Path  # what `number_copies` wrote

    @property
    def firsts(self) -> list[int]:
        """The number in the corpus of the first part of every source."""
        return [0, *np.cumsum([pq.read_metadata(file).num_rows for file in self.files])[:-1]]

    def tables(self, *columns: str) -> Iterator[tuple[str, pa.Table]]:
        """(shard, some columns of a row group, and `copy`) in the order of sources and rows."""
        copies, first = np.load(self.copies, mmap_mode="r"), 0
        for shard, file in zip(self.shards, self.files, strict=True):
            with pq.ParquetFile(file, read_dictionary=["domain"]) as parquet:
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group, list(columns))
                    yield shard, numbered(table, copies, first)
                    first += len(table)


def numbered(table: pa.Table, copies: NDArray[np.uint32], first: int) -> pa.Table:
    """Parts of the corpus from number `first` on, with a column `copy`."""
    mine = np.array(copies[first : first + len(table)], np.uint64)
    return table.append_column("copy", pa.array(mine))


def number_copies(files: list[Path], path: Path, least: int = 2**17) -> None:
    """Write of every part of the corpus how many with the same id come before it, in 16 passes over
    their ids at most: a sixteenth of them, or `least`, are in memory together."""
    if path.exists():
        return
    total = sum(pq.read_metadata(file).num_rows for file in files)
    looks = -(-total // max(least, -(-total // 16))) or 1
    with replacing(path) as aside:
        copies = np.lib.format.open_memmap(aside, "w+", np.uint32, (total,))
        for look in range(looks):
            ids, places, first = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
            for every in _ids(files):
                mine = np.flatnonzero(every % np.uint64(looks) == look)
                ids.append(every[mine])
                places.append(mine + first)
                first += len(every)
            together, place = np.concatenate(ids), np.concatenate(places)
            order = np.argsort(together, kind="stable")
            begins = np.diff(together[order], prepend=~together[order[:1]]) != 0
            number = np.arange(len(order))
            number -= np.maximum.accumulate(np.where(begins, number, 0))
            copies[place[order]] = number
        copies.flush()


def _ids(files: list[Path]) -> Iterator[NDArray[np.uint64]]:
    """The ids of all parts, some at a time."""
    for file in files:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16) as parquet:
            for batch in parquet.iter_batches(2**16, columns=["id"], use_threads=False):
                yield batch["id"].to_numpy()


@dataclass
class Totals:
    """What there is, per domain, and the spread of every column of scores."""

    domains: dict[str, list[int]] = field(default_factory=dict)  # eligible parts, their tokens
    refusals: dict[str, dict[str, int]] = field(default_factory=dict)  # per domain, by reason
    # Of every column: parts, Σ s, Σ s².
    moments: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def refused(self) -> dict[str, int]:
        """How many parts are refused in all, by reason."""
        each = self.refusals.values()
        return {name: sum(domain[name] for domain in each) for name in REFUSED.values()}

    def spread(self, name: str, exact: bool) -> float:
        """The unit of temperatures: the standard deviation of a column; 1 of exact scores, and
        where all are equal."""
        count, first, second = self.moments[name]
        variance = second / max(count, 1) - (first / max(count, 1)) ** 2
        return math.sqrt(variance) if variance > 1e-18 and not exact else 1.0


def totals(scores: Scores, names: list[str], domains: Iterable[str]) -> Totals:
    """One look at everything; `domains` that are known to be, also where nothing comes of them."""
    total = Totals(
        {domain: [0, 0] for domain in domains}, moments={name: np.zeros(3) for name in names}
    )
    for _, table in scores.tables("domain", "tokens", "refused", *names):
        refused = table["refused"].to_numpy()
        kept = table.filter(pa.array(refused == ELIGIBLE))
        for domain, rows in _by_domain(table).items():
            counts = total.domains.setdefault(domain, [0, 0])
            reasons = total.refusals.setdefault(domain, dict.fromkeys(REFUSED.values(), 0))
            for code, name in REFUSED.items():
                reasons[name] += int((refused[rows] == code).sum())
            rows = rows[refused[rows] == ELIGIBLE]
            counts[0] += len(rows)
            counts[1] += int(table["tokens"].to_numpy()[rows].sum())
        for name in names:
            s = kept[name].to_numpy()
            total.moments[name] += (len(s), s.sum(), (s**2).sum())
    return total


def _by_domain(table: pa.Table) -> dict[str, NDArray[np.int64]]:
    """Row numbers of each domain of a table."""
    encoded = table["domain"].unify_dictionaries().combine_chunks()
    codes = encoded.indices.to_numpy()
    return {
        name: np.flatnonzero(codes == code)
        for code, name in enumerate(encoded.dictionary.to_pylist())
    }


def budgets(options: SelectionOptions, totals: Totals) -> tuple[dict[str, int], NDArray[np.int64]]:
    """(group of each domain, budgets (G,) in documents or tokens).

    Raises UserError where a domain is unknown or not named, or has less than is asked for.
    """
    unit, asked = options.budget
    documents = unit == "documents"
    domains = known = sorted(totals.domains)
    groups = {domain: number for number, domain in enumerate(domains)}
    key = f"selection.{unit}"
    available = np.array([totals.domains[domain][not documents] for domain in domains])
    empty = [domain for domain in domains if not totals.domains[domain][0]]
    if isinstance(asked, dict):
        wrong = sorted(asked.keys() ^ set(domains))
        if wrong:
            raise UserError(
                f"{key}: {', '.join(wrong)} is not in both, the budget and the data; the data has "
                f"{', '.join(domains)}: name each, with 0 to leave it out"
            )
        each = np.array([asked[domain] for domain in domains], np.float64)
    elif options.within == "domain":
        if empty:
            raise UserError(
                f"{key}={asked}: no eligible document in domain {', '.join(empty)}"
                f"{_refusals(options, totals, empty)}; remove the domain"
            )
        each = np.full(len(domains), asked, np.float64)
    else:
        groups = dict.fromkeys(domains, 0)
        domains, available, each = (
            ["the corpus"],
            available.sum(keepdims=True),
            np.array([asked], np.float64),
        )
    wanted = np.round(each * available if unit == "fraction" else each).astype(np.int64)
    for domain, want, have in zip(domains, wanted, available, strict=True):
        if want > have:
            raise UserError(
                f"{key}={asked}: {want} are asked for, but {domain} has only {have} eligible"
                f"{_refusals(options, totals, [domain] if domain in totals.domains else known)}"
                "; ask for less"
            )
    if not wanted.any():
        raise UserError(
            f"{key}={asked}: nothing is asked for{_refusals(options, totals, known)}; raise it"
        )
    return groups, wanted


def _refusals(options: SelectionOptions, totals: Totals, domains: Iterable[str]) -> str:
    """Why parts of these domains are not eligible, and which key says so; "" where all are."""
    said = {
        "short": f"too short (lower selection.min_tokens={options.min_tokens})",
        "copy": f"copies of the target (selection.overlap={options.overlap}): take the target out "
        "of the corpus, or raise it",
        "benchmark": "sharing text with selection.benchmarks: take it out of the corpus",
    }
    counts = {why: sum(totals.refusals.get(d, {}).get(why, 0) for d in domains) for why in said}
    why = [f"{n} are refused as {said[name]}" for name, n in counts.items() if n]
    return f": {'; '.join(why)}" if why else ""


@dataclass(frozen=True)
class Sampler:
    """How one column of scores becomes keys, in which groups."""

    scores: Scores
    name: str
    temperature: float  # of the scores, in their own unit; 0: none, and no noise
    seed: int
    groups: dict[str, int]  # of every domain
    documents: bool  # whether costs are documents, or tokens

    @property
    def columns(self) -> tuple[str, ...]:
        return ("domain", "id", "tokens", "refused", self.name)

    def keys(self, table: pa.Table) -> NDArray[np.float64]:
        """(N,) keys of a table's parts; the largest are taken."""
        score = table[self.name].to_numpy()
        if not self.temperature:
            return score
        ids = ngram.of_copies(table["id"].to_numpy(), table["copy"].to_numpy())
        return ngram.keys(score, ids, self.temperature, self.seed)

    def sortable(
        self, table: pa.Table
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        """Order, group and cost (N,) of a table. What is not eligible costs nothing and comes
        last."""
        group = np.empty(len(table), np.int64)
        for domain, rows in _by_domain(table).items():
            group[rows] = self.groups[domain]
        eligible = table["refused"].to_numpy() == ELIGIBLE
        cost = np.ones(len(table), np.int64) if self.documents else table["tokens"].to_numpy()
        order = ngram.ordered(self.keys(table))
        return np.where(eligible, order, 0), group, np.where(eligible, cost, 0)

    def cut(self, budgets: NDArray[np.int64]) -> ngram.Cut:
        """The key at which each budget (G,) ends."""
        cut = ngram.start(budgets)
        while cut.bits < 64:
            sums = np.zeros((len(budgets), 2**ngram.DIGIT), np.int64)
            for _, table in self.scores.tables(*self.columns):
                sums += ngram.digits(cut, *self.sortable(table))
            cut = ngram.narrow(cut, sums)
        return cut


SIDECAR = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("domain", pa.string()),
        ("id", pa.uint64()),
        ("score", pa.float64()),
        ("key", pa.float64()),
        ("tokens", pa.int64()),
        ("refused", pa.string()),  # why it is not eligible
        ("selected", pa.bool_()),
    ]
)


@dataclass
class Profile:
    """What a choice is like, as sums."""

    domains: dict[str, list[int]] = field(default_factory=dict)  # chosen parts, their tokens
    # Eligible, chosen.
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros((2, LENGTHS), np.int64))
    mass: ngram.Mass = field(default_factory=lambda: ngram.mass(np.empty(0)))
    in_top: int = 0  # chosen parts that plain top-k would have chosen too

    def as_json(self) -> dict[str, Any]:
        """The content for `result.json`."""
        documents = sum(part[0] for part in self.domains.values())
        return {
            "documents": documents,
            "tokens": sum(part[1] for part in self.domains.values()),
            "effective_sample_size": ngram.effective_sample_size(self.mass),
            "overlap_with_top_k": self.in_top / max(documents, 1),
            "lengths": {
                name: {f"{2**power}": int(n) for power, n in enumerate(row) if n}
                for name, row in zip(("eligible", "chosen"), self.lengths, strict=True)
            },
            "domains": {
                name: {"documents": n, "tokens": t} for name, (n, t) in sorted(self.domains.items())
            },
        }


def write_sidecar(
    path: Path, sampler: Sampler, cut: ngram.Cut, top: ngram.Cut, metadata: dict[str, str]
) -> Profile:
    """Write the sidecar of a cut, and describe what was chosen; `top` is the cut of plain top-k."""
    plain = Sampler(sampler.scores, sampler.name, 0.0, 0, sampler.groups, sampler.documents)
    profile = Profile()
    schema = SIDECAR.with_metadata(metadata)
    with replacing(path) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for shard, table in sampler.scores.tables("row", "start", "end", *sampler.columns):
            order, group, cost = sampler.sortable(table)
            eligible = table["refused"].to_numpy() == ELIGIBLE
            inside, cut = ngram.chosen(cut, order, group, cost)
            inside &= eligible
            best, top = ngram.chosen(top, *plain.sortable(table))
            profile.in_top += int((inside & best).sum())
            score, tokens = table[sampler.name].to_numpy(), table["tokens"].to_numpy()
            unit = sampler.temperature or 1.0
            profile.mass = ngram.together(profile.mass, ngram.mass(score[eligible] / unit))
            for number, mask in enumerate((eligible, inside)):
                power = np.log2(np.maximum(tokens[mask], 1)).astype(np.int64)
                profile.lengths[number] += np.bincount(
                    np.minimum(power, LENGTHS - 1), minlength=LENGTHS
                )
            for domain, rows in _by_domain(table).items():
                rows = rows[inside[rows]]
                part = profile.domains.setdefault(domain, [0, 0])
                part[0] += len(rows)
                part[1] += int(tokens[rows].sum())
            why = pa.array(
                [REFUSED.get(code) for code in table["refused"].to_pylist()], pa.string()
            )
            shards = pa.array([shard], pa.string()).take(pa.array(np.zeros(len(table), np.int64)))
            columns = [shards, *(table[name] for name in ("row", "start", "end"))]
            columns += [table["domain"].cast(pa.string()), table["id"]]
            columns += [
                table[sampler.name],
                pa.array(sampler.keys(table)),
                table["tokens"],
                why,
                pa.array(inside),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        chosen = sorted(name for name, (parts, _) in profile.domains.items() if parts)
        writer.add_key_value_metadata({"domains": json.dumps(chosen)})
    return profile
