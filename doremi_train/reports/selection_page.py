"""What a selection chose, as a page and as a part of the report: beside each other what was chosen
and what was not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.console import short
from doremi_train.reports import charts
from doremi_train.reports.charts import Curve, Point
from doremi_train.reports.page import write_page


def write(page: Path, folder: Path, vocabulary: str | None) -> None:
    """The page of a folder of choices; `vocabulary` is the file that its n-grams are made of, if
    any."""
    write_page(page, "select.html.jinja", title=str(folder), selection=content(folder, vocabulary))


def content(folder: Path, vocabulary: str | None) -> dict[str, Any]:
    """What the template shows of a folder of choices."""
    result = files.read_json(folder / "result.json")
    made = Path(vocabulary).parent / "result.json" if vocabulary is not None else None
    steps = files.read_json(made).get("steps") if made is not None and made.exists() else None
    return {
        "eligible": {
            unit: f"{_sum(result['eligible'], unit):,}" for unit in ("documents", "tokens")
        },
        "refused": {why: count for why, count in result["refused"].items() if count},
        "bad_lines": result["bad_lines"],
        "vocabulary": utility(steps) if steps else None,
        "targets": [
            _target(name, part, result["eligible"]) for name, part in result["targets"].items()
        ],
    }


def _target(name: str, part: Mapping[str, Any], eligible: Mapping[str, Any]) -> dict[str, Any]:
    kl, all_ = part["kl"], _sum(eligible, "tokens")
    return {
        "name": name,
        "cards": [
            (f"{part['documents']:,}", f"documents, by {part['target_documents']:,} of the target"),
            (
                short(part["tokens"]),
                f"tokens, {part['tokens'] / max(all_, 1):.1%} of what is eligible",
            ),
            (
                f"{part['effective_sample_size']:.1f}",
                "documents, effective sample size of the weights",
            ),
            (f"{part['overlap_with_top_k']:.1%}", "are those of plain top-k"),
            (
                f"{kl['reduction']:.3f}",
                f"nats less KL: {kl['raw']:.3f} to the corpus, {kl['chosen']:.3f} to the choice",
            ),
        ],
        "charts": [_lengths(name, part["lengths"]), _domains(name, part, eligible)],
        "pairs": list(zip(part["examples"]["chosen"], part["examples"]["refused"], strict=False)),
    }


def _lengths(name: str, lengths: Mapping[str, Mapping[str, int]]) -> str:
    """The part of the documents in each power of two, of those eligible and of those chosen."""
    powers = sorted({int(power) for row in lengths.values() for power in row})
    curves = {
        which: Curve(
            powers, [[row.get(str(power), 0) / max(sum(row.values()), 1) for power in powers]]
        )
        for which, row in lengths.items()
    }
    title = f"{name}: lengths, from each up to its double"
    return charts.lines(
        title, "tokens", "part of the documents", curves, settings=True, logarithmic=True
    )


def _domains(name: str, part: Mapping[str, Any], eligible: Mapping[str, Any]) -> str:
    shares = {
        which: [
            Point(domains.get(domain, {"tokens": 0})["tokens"] / max(_sum(domains, "tokens"), 1))
            for domain in eligible
        ]
        for which, domains in (("eligible", eligible), ("chosen", part["domains"]))
    }
    return charts.rows(
        f"{name}: where the tokens are from", "part of the tokens", list(eligible), shares
    )


def utility(log: Sequence[Mapping[str, Any]]) -> str:
    """H_v over the size of the vocabulary, from the lines of the log."""
    tokens = [line["tokens"] for line in log]
    curves = {
        name: charts.Curve(tokens, [[line[key] for line in log]])
        for name, key in (
            ("mean length of the tokens", "utility_plain"),
            ("length as used", "utility_used"),
        )
    }
    return charts.lines(
        "Utility of the vocabulary", "tokens", "H_v, nats per byte", curves, logarithmic=True
    )


def _sum(domains: Mapping[str, Any], unit: str) -> int:
    return sum(domain[unit] for domain in domains.values())
