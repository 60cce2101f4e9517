"""Domains made from text, as a page: where they lie, how large they are, what is in them, and what
became of the given ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doremi_train import files
from doremi_train.reports import charts
from doremi_train.reports.charts import Cloud, Point
from doremi_train.reports.page import write_page


def write(page: Path, folder: Path) -> None:
    """The page of a folder that stage=regroup wrote."""
    result = files.read_json(folder / "result.json")
    of = files.read_json(folder / "domains.json")["of"]
    write_page(page, "regroup.html.jinja", title=str(folder), **content(result, of))


def content(result: Mapping[str, Any], of: list[int]) -> dict[str, Any]:
    """What the template shows; `of` (F,) is the domain of each fine cluster."""
    told, sizes = result["told"], result["domains"]
    total = max(sum(size["tokens"] for size in sizes.values()), 1)
    stable = told["stability"]
    names = [domain["name"] for domain in told["domains"]]
    cards = [
        (f"{sum(size['documents'] for size in sizes.values()):,}", "documents"),
        (f"{len(sizes)}", f"domains, of {len(of)} fine clusters"),
        (f"{result['adjusted_rand_of_given']:.3f}", "adjusted Rand against the given domains"),
    ]
    if stable is not None:
        cards.append((f"{stable['domains']:.3f}", "adjusted Rand between the two best starts"))
        cards.append((f"{stable['fine']:.3f}", "the same of the fine clusters"))
    return {
        "cards": cards,
        "findings": told["findings"],
        "picture": _picture(told, names, of),
        "sizes": charts.rows(
            "Sizes",
            "part of the words",
            list(sizes),
            {"words": [Point(size["tokens"] / total) for size in sizes.values()]},
        ),
        "domains": [
            {
                **domain,
                "levels": [
                    (name, f"{size['documents']:,}", f"{size['tokens'] / total:.2%}")
                    for name, size in sizes.items()
                    if _of(name, domain["name"])
                ],
            }
            for domain in told["domains"]
        ],
        "names": names,
        "distances": [
            (name, [f"{distance:.2f}" for distance in row])
            for name, row in zip(names, told["distances"], strict=True)
        ],
        "new": list(sizes),
        "map": [
            (name, [_share(row.get(new), result["given"][name]) for new in sizes])
            for name, row in result["map"].items()
        ],
    }


def _of(name: str, domain: str) -> bool:
    """Whether a name is that of a domain, or of one of its levels."""
    level = name.removeprefix(f"{domain}-level")
    return name == domain or (level != name and level.isdigit())


def _share(part: Mapping[str, int] | None, whole: Mapping[str, int]) -> str:
    return f"{part['tokens'] / max(whole['tokens'], 1):.1%}" if part else ""


def _picture(told: Mapping[str, Any], names: list[str], of: list[int]) -> str:
    clouds = {
        name: Cloud(
            [place for place, domain in zip(told["picture"], of, strict=True) if domain == k],
            [size for size, domain in zip(told["tokens"], of, strict=True) if domain == k],
        )
        for k, name in enumerate(names)
    }
    return charts.clouds("Fine clusters, along their two main directions", clouds)
