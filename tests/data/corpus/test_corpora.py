"""Ready configurations of public corpora: each prepares an imitation of the layout, and published
weights fit it."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from helpers.command import TINY, Command
from helpers.configuration import compose
from helpers.corpus import documents

from doremi_train import mixture as artefact

PILE = (
    "ArXiv", "BookCorpus2", "Books3", "DM Mathematics", "Enron Emails", "EuroParl", "FreeLaw",
    "Github", "Gutenberg (PG-19)", "HackerNews", "NIH ExPorter", "OpenSubtitles", "OpenWebText2",
    "PhilPapers", "Pile-CC", "PubMed Abstracts", "PubMed Central", "StackExchange",
    "USPTO Backgrounds", "Ubuntu IRC", "Wikipedia (en)", "YoutubeSubtitles",
)  # fmt: skip
GLAM = ("Books", "Conversations", "Filtered webpages", "Forums", "News", "Wikipedia")
REDPAJAMA = ("arxiv", "book", "c4", "common_crawl", "github", "stackexchange", "wikipedia")
SLIMPAJAMA = (
    "RedPajamaArXiv", "RedPajamaBook", "RedPajamaC4", "RedPajamaCommonCrawl", "RedPajamaGithub",
    "RedPajamaStackExchange", "RedPajamaWikipedia",
)  # fmt: skip
COMMON_PILE = (
    "arxiv_abstracts", "arxiv_papers", "biodiversity_heritage_library", "caselaw_access_project",
    "cccc", "data_provenance_initiative", "doab", "foodista", "github_archive",
    "library_of_congress", "libretexts", "news", "oercommons", "peS2o", "pre_1929_books",
    "pressbooks", "project_gutenberg", "public_domain_review", "pubmed",
    "python_enhancement_proposals", "regulations", "stackexchange", "stackv2_edu", "stackv2_html",
    "ubuntu_irc", "uk_hansard", "usgpo", "uspto", "wikimedia", "wikiteam", "youtube",
)  # fmt: skip
DOLMA = {  # domain: folders
    "algebraic_stack": ["proof_pile_2-algebraic_stack"], "arxiv": ["redpajama-arxiv"],
    "books": ["books"], "c4": ["c4-filtered"],
    "cc_en": ["cc_en_head", "cc_en_middle", "cc_en_tail"],
    "cc_news": ["cc_news_head", "cc_news_middle"], "flan": ["tulu_flan"],
    "megawika": ["wikiref_megawika"], "open_web_math": ["proof_pile_2-open_web_math"],
    "pes2o": ["pes2o"], "reddit": ["reddit"], "refinedweb": ["falcon-refinedweb-filtered"],
    "stackexchange": ["redpajama-stackexchange"], "starcoder": ["starcoder"], "wiki": ["wiki"],
}  # fmt: skip

Record = dict[str, Any]


def texts(seed: int) -> Iterator[str]:
    return documents(seed, "abcdefgh", 50, 8000)


def stream(names: tuple[str, ...], key: str) -> list[Record]:
    return [
        {"text": text, "meta": {key: name}}
        for seed, name in enumerate(names)
        for text in texts(seed)
    ]


def plain(seed: int) -> list[Record]:
    return [{"text": text, "id": "x", "source": "y"} for text in texts(seed)]


def pile() -> dict[str, list[Record]]:
    records = stream(PILE, "pile_set_name")
    return {
        "train/00.jsonl.zst": records[::2],
        "train/01.jsonl.zst": records[1::2],
        "val.jsonl.zst": records[:1],
    }


def slimpajama() -> dict[str, list[Record]]:
    records = stream(SLIMPAJAMA, "redpajama_set_name")
    return {
        "train/chunk1/example_train_0.jsonl.zst": records[::2],
        "train/chunk10/example_train_1.jsonl.zst": records[1::2],
        "validation/chunk1/example_holdout_0.jsonl.zst": records[:1],
    }


def redpajama() -> dict[str, list[Record]]:
    files = {
        "arxiv": "arxiv/arxiv_024de5df.jsonl",
        "book": "book/book.jsonl",
        "c4": "c4/c4-train.00000-of-01024.jsonl",
        "common_crawl": "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst",
        "github": "github/filtered_08cdfa755e6d4d89b673d5bd1acee5f6.sampled.jsonl",
        "stackexchange": "stackexchange/stackexchange.jsonl",
        "wikipedia": "wikipedia/wiki.jsonl",
    }
    return {file: plain(seed) for seed, file in enumerate(files.values())}


def dolma() -> dict[str, list[Record]]:
    folders = [folder for several in DOLMA.values() for folder in several]
    return {f"{folder}/{folder}-0000.json.gz": plain(seed) for seed, folder in enumerate(folders)}


CORPORA = {
    "pile": (PILE, pile),
    "slimpajama": (SLIMPAJAMA, slimpajama),
    "redpajama": (REDPAJAMA, redpajama),
    "dolma": (tuple(DOLMA), dolma),
    "common_pile": (
        COMMON_PILE,
        lambda: {
            f"{name}/{name}-dolma-0000.json.gz": plain(seed)
            for seed, name in enumerate(COMMON_PILE)
        },
    ),
    "glam": (
        GLAM,
        lambda: {f"{name}/train-0.jsonl": plain(seed) for seed, name in enumerate(GLAM)},
    ),
}


def write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    compress = {".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress}.get(
        path.suffix, bytes
    )
    path.write_bytes(compress(data))


@pytest.mark.parametrize("name", CORPORA)
def test_the_published_layout_is_prepared(name: str, command: Command, tmp_path: Path) -> None:
    domains, files = CORPORA[name]
    for file, records in files().items():
        write(tmp_path / "copy" / file, records)
    more = [
        f"data={name}",
        f"data.home={tmp_path / 'copy'}",
        "data.validation_fraction=0.3",
        "stage=prepare",
    ]
    outcome = command(*TINY, *more, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome
    found = json.loads((tmp_path / "run" / "prepare" / "manifest.json").read_text())["domains"]
    assert sorted(found) == sorted(domains)


def test_a_copy_that_is_not_there_is_named(command: Command, tmp_path: Path) -> None:
    outcome = command(
        "data=redpajama", f"data.home={tmp_path}", f"run_dir={tmp_path / 'run'}", "stage=prepare"
    )
    assert outcome.code == 2 and f"data.domains.arxiv.train='{tmp_path}/arxiv/" in outcome.err, (
        outcome
    )


PUBLISHED = {
    "pile_baseline": PILE,
    "pile_doremi": PILE,
    "pile_doremi_1b": PILE,
    "glam_doremi": GLAM,
    "glam_tuned": GLAM,
    "redpajama_baseline": REDPAJAMA,
    "common_pile_comma": COMMON_PILE,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_of_these_domains(name: str) -> None:
    mixture = compose(f"mixture={name}")["mixture"]
    assert mixture["normalize"]
    assert 0.98 < math.fsum(mixture["weights"].values()) < 1.04  # as published, rounded
    found = artefact.checked(mixture["weights"], sorted(PUBLISHED[name]), "x", normalize=True)
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)


def test_published_weights_are_the_published_ones() -> None:
    shared = Path(__file__).parents[4] / "shared" / "golden" / "published_weights.json"
    if not shared.exists():
        pytest.skip("the table of published weights is not beside this checkout")
    golden = json.loads(shared.read_text())
    known = {
        "pile_baseline": golden["pile"]["baseline"],
        "pile_doremi": golden["pile"]["doremi_280m"],
        "pile_doremi_1b": golden["pile"]["doremi_1b"],
        "glam_doremi": golden["glam"]["round_3"],
        "glam_tuned": golden["glam"]["downstream_tuned"],
        "redpajama_baseline": golden["redpajama_baseline"],
    }
    for name, expected in known.items():
        assert compose(f"mixture={name}")["mixture"]["weights"] == expected, name
