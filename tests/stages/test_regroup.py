"""Domains made from text as a user meets them: what is found, written and refused, and what trains
on it."""

import csv
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.command import TINY, environment, run_here
from helpers.corpus import documents, write_jsonl
from helpers.encoder import untrained
from helpers.topics import document, planted, texts_of

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.methods.clusters import adjusted_rand

pytest.importorskip("numba")
pytest.importorskip("sklearn")

DOMAINS, EACH, DOCUMENTS = 3, 3, 60


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Three domains that hide three topics each: (data.root, the topic of every text)."""
    root = tmp_path_factory.mktemp("raw")
    return root, planted(root, DOMAINS, EACH, DOCUMENTS)


@pytest.fixture(scope="module")
def found(corpus: tuple[Path, dict[str, int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run_dir of nine domains made of all text."""
    run_dir = tmp_path_factory.mktemp("found")
    ran(*regrouping(corpus[0], run_dir, "regroup.domains=9"))
    return run_dir


def regrouping(root: Path, run_dir: Path, *more: str) -> list[str]:
    given = dict(override.split("=", 1) for override in more)
    defaults = {
        "stage": "regroup", "data.root": str(root), "run_dir": str(run_dir),
        "regroup.workers": "1", "regroup.starts": "2", "regroup.dimensions": "256",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (defaults | given).items()]


def ran(*overrides: str) -> Any:
    outcome = run_here(*overrides)
    assert outcome.code == 0, outcome
    return outcome


def refused(*overrides: str) -> str:
    outcome = run_here(*overrides)
    assert outcome.code == 2 and "Traceback" not in outcome.err, outcome
    return outcome.err


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return pq.read_table(run_dir / "regroup" / "sidecar.parquet").to_pylist()


def result(run_dir: Path) -> Any:
    return json.loads((run_dir / "regroup" / "result.json").read_text())


def by_text(run_dir: Path, root: Path) -> dict[str, str]:
    """{text: the domain that was made}."""
    texts = texts_of(root)
    return {texts[row["shard"], row["row"]]: row["domain"] for row in rows(run_dir)}


def agreement(run_dir: Path, root: Path, topics: dict[str, int]) -> float:
    """Adjusted Rand of the domains against the true topics, over all documents."""
    domains = by_text(run_dir, root)
    names = sorted(set(domains.values()))
    table = np.zeros((len(names), max(topics.values()) + 1))
    for text, domain in domains.items():
        table[names.index(domain), topics[text]] += 1
    assert table.sum() == len(topics)
    return adjusted_rand(table)


# ── What is found ───────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_hidden_topics_are_found(corpus: tuple[Path, dict[str, int]], found: Path) -> None:
    root, topics = corpus
    assert agreement(found, root, topics) > 0.9
    content = result(found)
    sizes = content["domains"]
    assert len(sizes) == 9
    assert sum(size["documents"] for size in sizes.values()) == len(topics)
    assert sum(size["tokens"] for size in sizes.values()) == sum(len(t.split()) for t in topics)
    assert content["told"]["stability"]["domains"] > 0.9
    for given, row in content["map"].items():
        total = Counter[str]()
        for size in row.values():
            total.update(size)
        assert total == content["given"][given]
    assert len(content["map"]) == 3


def test_given_domains_are_split_by_themselves(
    corpus: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    root, topics = corpus
    out = ran(*regrouping(root, tmp_path, "regroup.domains=3", "regroup.within=domain")).out
    assert "only" not in out and "9 domains" in out
    assert agreement(tmp_path, root, topics) > 0.9
    for row in rows(tmp_path):
        assert row["domain"].startswith(f"{row['given']}-")
    assert all(len(row) == 3 for row in result(tmp_path)["map"].values())


def test_names_are_words_of_the_domain_and_of_no_other(
    corpus: tuple[Path, dict[str, int]], found: Path
) -> None:
    texts: dict[str, list[set[str]]] = {}
    for text, domain in by_text(found, corpus[0]).items():
        texts.setdefault(domain, []).append(set(text.split()))
    part = {
        (domain, word): sum(word in text for text in own) / len(own)
        for domain, own in texts.items()
        for word in {word for name in texts for word in name.split("-")}
    }
    for domain in texts:
        for word in domain.split("-"):
            others = max(part[other, word] for other in texts.keys() - {domain})
            assert part[domain, word] > max(0.1, 2 * others), (domain, word)


def test_the_page_shows_texts_and_names_as_they_are(tmp_path: Path) -> None:
    texts = [f"<b>bold</b> [red]{document(topic, n)}" for topic in range(2) for n in range(30)]
    write_jsonl(tmp_path / "raw" / "<i>it" / "train.jsonl", texts)
    out = ran(*regrouping(tmp_path / "raw", tmp_path / "run", "regroup.domains=2")).out
    page = (tmp_path / "run" / "regroup" / "report.html").read_text()
    assert "&lt;b&gt;bold" in page and "<b>bold" not in page
    assert "&lt;i&gt;it" in page and "<i>it" not in page
    assert page.count("<svg") == 2
    for name in result(tmp_path / "run")["domains"]:
        assert name in page and name in out


@pytest.mark.slow
def test_the_same_for_any_workers_and_division_into_files(
    corpus: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    """Model and domains are the same bytes; with levels, whose cuts are over all text."""
    root, _ = corpus
    again = tmp_path / "again"
    for domain in sorted(root.iterdir()):
        lines = [*(domain / "train.jsonl").open()]
        for part in range(3):  # other files, another order
            path = again / domain.name / f"train-{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines[::-1][part::3]))
    good = write_jsonl(tmp_path / "good.jsonl", [document(0, n) for n in range(900, 910)])
    more = ("regroup.domains=4", "regroup.levels=2", f"regroup.good=[{good}]")
    for name, data, workers in (("one", root, 1), ("other", again, 2)):
        ran(*regrouping(data, tmp_path / name, *more, f"regroup.workers={workers}"))
    assert by_text(tmp_path / "one", root) == by_text(tmp_path / "other", again)
    for file in ("model.npz", "domains.json"):
        one, other = (tmp_path / name / "regroup" / file for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
    one, other = (result(tmp_path / name) for name in ("one", "other"))
    assert one == other


@pytest.mark.slow
def test_what_was_read_serves_another_number_and_a_finished_run_does_nothing(
    corpus: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    store = f"store={tmp_path / 'store'}"
    ran(*regrouping(corpus[0], tmp_path / "one", "regroup.domains=4", store))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "regroup").rglob("*.parquet")}
    more = (store, "regroup.domains=5", "regroup.least_tokens=1")
    ran(*regrouping(corpus[0], tmp_path / "two", *more))
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "regroup").rglob("*.parquet")}
    assert before == after and before
    sidecar = (tmp_path / "two" / "regroup" / "sidecar.parquet").stat().st_mtime_ns
    ran(*regrouping(corpus[0], tmp_path / "two", *more))
    assert (tmp_path / "two" / "regroup" / "sidecar.parquet").stat().st_mtime_ns == sidecar


@pytest.mark.slow
def test_levels_are_by_likeness_to_good_text(tmp_path: Path) -> None:
    """In every domain, a fifth of every other document is of topic 8, as the good text is."""
    texts = {}
    for topic in range(2):
        for n in range(60):
            good = n % 2
            words = document(8 if good else 9, n).split()[:40]
            texts[" ".join([document(topic, n), document(topic, n + 1000), *words])] = good
    write_jsonl(tmp_path / "raw" / "web" / "train.jsonl", list(texts))
    good = write_jsonl(tmp_path / "good.jsonl", [document(8, n) for n in range(900, 920)])
    more = ("regroup.domains=2", "regroup.levels=2", f"regroup.good=[{good}]")
    ran(*regrouping(tmp_path / "raw", tmp_path / "run", *more))
    right = Counter[bool]()
    for text, domain in by_text(tmp_path / "run", tmp_path / "raw").items():
        right[domain.endswith("-level2") == bool(texts[text])] += 1
    assert right[True] > 0.8 * right.total()
    sizes = result(tmp_path / "run")["domains"]
    assert sorted(sizes) == sorted(
        f"{domain['name']}-level{n}"
        for domain in result(tmp_path / "run")["told"]["domains"]
        for n in (1, 2)
    )


def test_new_documents_go_to_domains_found_earlier(
    corpus: tuple[Path, dict[str, int]], found: Path, tmp_path: Path
) -> None:
    root, topics = corpus
    own = Counter((topics[t], domain) for t, domain in by_text(found, root).items())
    of = {topic: domain for (topic, domain), n in own.items() if n > DOCUMENTS / 2}
    new = {document(topic, n): topic for topic in (1, 4, 7) for n in range(500, 520)}
    write_jsonl(tmp_path / "raw" / "new" / "train.jsonl", list(new))
    more = (f"regroup.model={found / 'regroup'}",)
    ran(*regrouping(tmp_path / "raw", tmp_path / "run", *more))
    given = by_text(tmp_path / "run", tmp_path / "raw")
    right = [given[text] == of[topic] for text, topic in new.items()]
    assert np.mean(right) > 0.9
    assert len(result(tmp_path / "run")["domains"]) == 9
    # And what was given to it first goes where it went.
    ran(*regrouping(root, tmp_path / "same", *more))
    assert by_text(tmp_path / "same", root) == by_text(found, root)


@pytest.mark.slow
def test_new_documents_of_domains_that_were_split(
    corpus: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    """The model knows that it was made within domains, and names what it does not know."""
    root, _ = corpus
    ran(*regrouping(root, tmp_path / "one", "regroup.domains=2", "regroup.within=domain"))
    more = (f"regroup.model={tmp_path / 'one' / 'regroup'}",)
    ran(*regrouping(root, tmp_path / "two", *more))
    assert by_text(tmp_path / "one", root) == by_text(tmp_path / "two", root)
    write_jsonl(tmp_path / "raw" / "unknown" / "train.jsonl", [document(0, 1)])
    err = refused(*regrouping(tmp_path / "raw", tmp_path / "three", *more))
    assert "knows no domain 'unknown'" in err and "given0, given1, given2" in err


@pytest.mark.slow
def test_an_encoder_takes_the_place_of_words(tmp_path: Path) -> None:
    """One that learned nothing tells languages apart by their tokens; each text by itself, so that
    the batch does not matter."""
    texts = [*documents(1, "abcdefgh", 200, 12_000), *documents(2, "ijklmnop", 200, 12_000)]
    folder = untrained(tmp_path / "encoder", texts)
    write_jsonl(tmp_path / "raw" / "web" / "train.jsonl", texts)
    more = ("regroup.domains=2", f"regroup.encoder={folder}")
    ran(*regrouping(tmp_path / "raw", tmp_path / "run", *more))
    made = by_text(tmp_path / "run", tmp_path / "raw")
    pairs = Counter((domain, min(text.replace(" ", "")) > "h") for text, domain in made.items())
    assert (
        sum(n for _, n in pairs.most_common(2)) > 0.95 * len(made) and len(set(made.values())) == 2
    )
    write_jsonl(tmp_path / "new" / "web" / "train.jsonl", texts[::-1][:7])
    later = (f"regroup.model={tmp_path / 'run' / 'regroup'}",)  # knows its encoder
    ran(*regrouping(tmp_path / "new", tmp_path / "later", *later))
    again = by_text(tmp_path / "later", tmp_path / "new")
    assert again == {text: made[text] for text in again} and len(again) == 7
    none = f"regroup.encoder={tmp_path / 'none'}"
    assert f"{none}: " in refused(*regrouping(tmp_path / "raw", tmp_path / "no", none))


# ── Training on it ──────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_mixture_over_found_domains_is_trained(
    corpus: tuple[Path, dict[str, int]], found: Path, tmp_path: Path
) -> None:
    """DoReMi over them, and every document, those for validation too, is of its new domain."""
    root, _ = corpus
    sidecar = found / "regroup" / "sidecar.parquet"
    ran(
        *TINY, f"data.root={root}", f"data.selection={sidecar}", f"run_dir={tmp_path}",
        "data.validation_fraction=0.2", "seed=58",
    )  # fmt: skip
    weights = json.loads((tmp_path / "weights.json").read_text())["weights"]
    sizes = result(found)["domains"]
    assert weights.keys() == sizes.keys()
    store = TokenStore.open(tmp_path / "prepare")
    manifest = json.loads((tmp_path / "prepare" / "manifest.json").read_text())["domains"]
    assert set(store.domains) == sizes.keys()
    for name, size in sizes.items():
        documents = {split: of["documents"] for split, of in manifest[name].items()}
        assert sum(documents.values()) == size["documents"] and documents["validation"] > 0


def test_validation_files_are_relabelled_too(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    for split, numbers in (("train", range(60)), ("validation", range(100, 110))):
        texts = [document(topic, n) for topic in range(2) for n in numbers]
        write_jsonl(root / "web" / f"{split}.jsonl", texts)
    ran(*regrouping(root, tmp_path / "run", "regroup.domains=2"))
    sidecar = tmp_path / "run" / "regroup" / "sidecar.parquet"
    ran(
        "stage=prepare", f"data.root={root}", f"data.selection={sidecar}",
        f"run_dir={tmp_path / 'prepared'}", "data.vocabulary_size=300",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "prepared" / "prepare" / "manifest.json").read_text())
    sizes = result(tmp_path / "run")["domains"]
    assert manifest["domains"].keys() == sizes.keys()
    for of in manifest["domains"].values():
        assert of["train"]["documents"] == 60 and of["validation"]["documents"] == 10


def test_a_domain_is_left_out_by_its_rows(
    corpus: tuple[Path, dict[str, int]], found: Path, tmp_path: Path
) -> None:
    table = pq.read_table(found / "regroup" / "sidecar.parquet")
    names = table["domain"].to_pylist()
    place, kept = table.schema.get_field_index("selected"), [name != names[0] for name in names]
    sidecar = tmp_path / "some.parquet"
    pq.write_table(table.set_column(place, "selected", pa.array(kept)), sidecar)
    ran(
        "stage=prepare", f"data.root={corpus[0]}", f"data.selection={sidecar}",
        f"run_dir={tmp_path / 'run'}", "data.vocabulary_size=300", "data.validation_fraction=0.2",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "run" / "prepare" / "manifest.json").read_text())
    assert manifest["domains"].keys() == set(names) - {names[0]}


def test_one_stream_of_domains_named_by_a_key(tmp_path: Path) -> None:
    """Given domains are those of the records."""
    path = tmp_path / "all.jsonl"
    lines = [{"text": document(n % 2, n), "of": f"part{n % 3}"} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran(
        "stage=regroup", f"data.files=[{path}]", "data.domain_key=of", f"run_dir={tmp_path}",
        "regroup.domains=2", "regroup.workers=1",
    )  # fmt: skip
    assert result(tmp_path)["map"].keys() == {"part0", "part1", "part2"}
    found = [row["domain"] for row in rows(tmp_path)]
    assert len(set(found[::2])) == len(set(found[1::2])) == 1 and found[0] != found[1]


# ── Evidence that survives other names ──────────────────────────────────────────────


def predicted(run_dir: Path) -> list[dict[str, float]]:
    with (run_dir / "fit" / "predictions.csv").open() as file:
        return [
            {name: float(value) for name, value in row.items() if name != "mixture"}
            for row in csv.DictReader(file)
        ]


def mixtures(path: Path, rows: list[dict[str, float]]) -> Path:
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["mixture", *rows[0]])
        writer.writerows([n, *row.values()] for n, row in enumerate(rows))
    return path


@pytest.mark.slow
def test_runs_under_old_names_predict_under_new_ones(found: Path, tmp_path: Path) -> None:
    old, content = ["given0", "given1", "given2"], result(found)
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 24)
    losses = 1 + np.exp(-2 * weights[:, :2] ** 0.6) + 0.1 * weights[:, 2:]
    rows = [
        dict(zip([*old, "a_loss", "b_loss"], [*w, *loss], strict=True))
        for w, loss in zip(weights, losses, strict=True)
    ]
    runs = mixtures(tmp_path / "runs.csv", rows)
    fit = ["stage=fit", f"fit.runs={runs}", "fit.regressor=saturating"]
    # Three mixtures by old names, and by new ones of the same text.
    points = [[0.2, 0.3, 0.5], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8]]
    named = [dict(zip(old, point, strict=True)) for point in points]
    sizes = {given: size["tokens"] for given, size in content["given"].items()}
    parts = {
        given: {new: size["tokens"] / sizes[given] for new, size in row.items()}
        for given, row in content["map"].items()
    }
    same = [
        {new: sum(row[g] * parts[g].get(new, 0) for g in old) for new in content["domains"]}
        for row in named
    ]
    by_old, by_new = (mixtures(tmp_path / f"{n}.csv", rows) for n, rows in ((1, named), (2, same)))
    ran(*fit, f"run_dir={tmp_path / 'old'}", f"fit.predict={by_old}")
    folder = f"fit.content={found / 'regroup'}"
    out = ran(*fit, f"run_dir={tmp_path / 'new'}", f"fit.predict={by_new}", folder).out
    assert "too far" not in out
    for one, other in zip(predicted(tmp_path / "old"), predicted(tmp_path / "new"), strict=True):
        assert other.pop("outside") < 0.05
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=0.01), name
        assert other["a_loss_low"] < other["a_loss"] < other["a_loss_high"]
    # A topic alone is no mixture of domains that hold three; of a source of that topic a tenth is.
    topic = max(parts["given0"], key=parts["given0"].__getitem__)
    write_jsonl(tmp_path / "raw" / "new" / "train.jsonl", [document(0, n) for n in range(900, 930)])
    model = f"regroup.model={found / 'regroup'}"
    ran(*regrouping(tmp_path / "raw", tmp_path / "later", model))
    both = f"fit.content=[{found / 'regroup'},{tmp_path / 'later' / 'regroup'}]"
    far = mixtures(
        tmp_path / "far.csv",
        [{"given0": 0, topic: 1, "new": 0}, {"given0": 0.9, topic: 0, "new": 0.1}],
    )
    out = ran(*fit, f"run_dir={tmp_path / 'far'}", f"fit.predict={far}", both).out
    first, second = predicted(tmp_path / "far")
    assert first["outside"] > 0.5 and 0.02 < second["outside"] < 0.1
    assert "fit.predict: 0 is too far from all that the runs had" in out
    assert "fit.predict: 1 is" not in out


@pytest.mark.slow
def test_contents_that_cannot_be_compared(
    corpus: tuple[Path, dict[str, int]], found: Path, tmp_path: Path
) -> None:
    rows = [{"given0": w, "web": 1 - w, "a_loss": 1 + w**2} for w in (0.1, 0.3, 0.5, 0.8)]
    runs = mixtures(tmp_path / "runs.csv", rows)
    fit = [
        "stage=fit", f"fit.runs={runs}", "fit.regressor=saturating", f"fit.predict={runs}",
        f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    folder = found / "regroup"
    assert "counted no domain web" in refused(*fit, f"fit.content={folder}")
    assert f"fit.content={tmp_path}" in refused(*fit, f"fit.content={tmp_path}")
    twice = f"fit.content=[{folder},{folder}]"
    assert "is in an earlier folder too" in refused(*fit, twice)
    ran(*regrouping(corpus[0], tmp_path / "other", "seed=1"))
    other = f"fit.content=[{folder},{tmp_path / 'other' / 'regroup'}]"
    assert "has other clusters than" in refused(*fit, other)


# ── What is refused, and what has a defined result ──────────────────────────────────


def texts(*given: str) -> Callable[[Path], Path]:
    return lambda root: write_jsonl(root / "web" / "train.jsonl", list(given)).parents[1]


TWO = [document(topic, n) for topic in range(2) for n in range(20)]


def test_fewer_documents_than_clusters(tmp_path: Path) -> None:
    root = texts(*TWO[:3])(tmp_path / "raw")
    err = refused(*regrouping(root, tmp_path / "run", "regroup.domains=16"))
    assert "regroup.domains=16: the data has only 3 different documents" in err
    ran(*regrouping(texts(*TWO)(tmp_path / "more"), tmp_path / "two", "regroup.domains=2"))


def test_empty_documents_and_those_without_words(tmp_path: Path) -> None:
    """Empty ones are none; those without a known word go to the largest domain."""
    many = [*TWO, *(document(0, n) for n in range(100, 140)), "", " \n ", "0", ""]
    root = texts(*many)(tmp_path / "raw")
    ran(*regrouping(root, tmp_path / "run", "regroup.domains=2"))
    found = {row["row"]: row for row in rows(tmp_path / "run")}
    assert len(found) == len(many) - 2
    sizes = result(tmp_path / "run")["domains"]
    largest = max(sizes, key=lambda name: sizes[name]["tokens"])
    for row in (len(TWO) + 41, len(TWO) + 42):
        assert found[row]["cluster"] == -1 and found[row]["domain"] == largest
    err = refused(*regrouping(texts("", "")(tmp_path / "none"), tmp_path / "two"))
    assert "holds no text" in err


@pytest.mark.parametrize("many", [["😀" * n for n in range(1, 31)], [f"w{n}" for n in range(30)]])
def test_no_word_that_two_documents_have(many: list[str], tmp_path: Path) -> None:
    err = refused(*regrouping(texts(*many)(tmp_path / "raw"), tmp_path / "run"))
    assert "only 0 different documents with words that others have too" in err


def test_one_document_repeated(tmp_path: Path) -> None:
    root = texts(*[TWO[0]] * 50)(tmp_path / "raw")
    err = refused(*regrouping(root, tmp_path / "run", "regroup.domains=2"))
    assert "only 1 different documents" in err
    ran(*regrouping(root, tmp_path / "one", "regroup.domains=1"))
    (size,) = result(tmp_path / "one")["domains"].values()
    assert size["documents"] == 50


def test_copies_are_named(tmp_path: Path) -> None:
    copied = [f"{TWO[0]} number {n}" for n in range(30)]
    root = texts(*TWO[1:], *copied)(tmp_path / "raw")
    ran(*regrouping(root, tmp_path / "run", "regroup.domains=3"))
    named = Counter(row["domain"] for row in rows(tmp_path / "run") if row["row"] >= len(TWO) - 1)
    (name, count), *_ = named.most_common()
    assert name.startswith("copies-") and count == 30
    assert sum(name.startswith("copies-") for name in result(tmp_path / "run")["domains"]) == 1


def test_a_language_without_spaces(tmp_path: Path) -> None:
    random_ = random.Random(0)
    words = [
        ["".join(chr(first + random_.randrange(400)) for _ in range(2)) for _ in range(80)]
        for first in (0x4E00, 0x6E00)
    ]
    many = ["".join(random_.choices(own, k=40)) for own in words for _ in range(30)]
    root = texts(*many)(tmp_path / "raw")
    ran(*regrouping(root, tmp_path / "run", "regroup.domains=2"))
    domains = [row["domain"] for row in rows(tmp_path / "run")]
    assert len(set(domains[:30])) == len(set(domains[30:])) == 1 and domains[0] != domains[30]
    assert all(len(part) == 2 for name in set(domains) for part in name.split("-"))


def test_one_domain(tmp_path: Path) -> None:
    root = texts(*TWO)(tmp_path / "raw")
    ran(*regrouping(root, tmp_path / "run", "regroup.domains=1", "regroup.starts=1"))
    content = result(tmp_path / "run")
    assert len(content["domains"]) == 1 and content["told"]["stability"] is None
    assert content["adjusted_rand_of_given"] == 1


def test_more_domains_than_have_the_least_size(tmp_path: Path) -> None:
    root = texts(*TWO)(tmp_path / "raw")
    more = ("regroup.domains=4", "regroup.least_tokens=1500")
    out = ran(*regrouping(root, tmp_path / "run", *more)).out
    assert "only 2 of 4 domains of the least size were found" in out
    sizes = result(tmp_path / "run")["domains"].values()
    assert len(sizes) == 2 and min(size["tokens"] for size in sizes) >= 1500


def test_good_that_matches_nothing(tmp_path: Path) -> None:
    root = texts(*TWO)(tmp_path / "raw")
    more = ("regroup.domains=2", "regroup.levels=2")
    none = f"regroup.good=[{tmp_path}/none*.jsonl]"
    assert "regroup.good=" in refused(*regrouping(root, tmp_path / "a", *more, none))
    other = write_jsonl(tmp_path / "other.jsonl", ["совсем другие слова"])
    err = refused(*regrouping(root, tmp_path / "b", *more, f"regroup.good=[{other}]"))
    assert "regroup.good: shares no word with the corpus" in err
    assert "regroup.fine=2: less than" in refused(
        *regrouping(root, tmp_path / "f", "regroup.fine=2")
    )
    assert "give both" in refused(*regrouping(root, tmp_path / "c", *more))
    empty = write_jsonl(tmp_path / "empty.jsonl", [" "])
    err = refused(*regrouping(root, tmp_path / "d", *more, f"regroup.good=[{empty}]"))
    assert "regroup.good: no document in its files" in err


def test_wrong_models_selections_and_sidecars(
    corpus: tuple[Path, dict[str, int]], found: Path, tmp_path: Path
) -> None:
    root, _ = corpus
    err = refused(*regrouping(root, tmp_path / "a", f"regroup.model={tmp_path}"))
    assert f"regroup.model={tmp_path}" in err and "give the folder" in err
    sidecar = found / "regroup" / "sidecar.parquet"
    err = refused(*regrouping(root, tmp_path / "b", f"data.selection={sidecar}"))
    assert "reads all documents" in err
    write_jsonl(root.parent / "other" / "web" / "train.jsonl", TWO)
    err = refused(
        "stage=prepare", f"data.root={root.parent / 'other'}", f"data.selection={sidecar}",
        f"run_dir={tmp_path / 'c'}",
    )  # fmt: skip
    assert "was made for other files" in err
    without = tmp_path / "without.parquet"
    pq.write_table(pq.read_table(sidecar).drop_columns("domain"), without)
    err = refused(
        "stage=prepare", f"data.root={root}", f"data.selection={without}",
        f"run_dir={tmp_path / 'd'}",
    )  # fmt: skip
    assert "has no column domain" in err


# ── Engines: kills are in test_killed, Slurm in test_slurm ──────────────────────────


@pytest.mark.acceptance
def test_ray_gives_the_same_bytes(
    corpus: tuple[Path, dict[str, int]],
    alone_with_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a Ray of the command's own; what a cluster does to lost workers is the engine's, and
    tested with selections."""
    pytest.importorskip("ray")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    ran(*regrouping(corpus[0], tmp_path / "calm", "regroup.domains=4"))
    more = ("regroup.domains=4", "regroup.engine=ray", "regroup.workers=2")
    assert "Ray of 1 node" in ran(*regrouping(corpus[0], tmp_path / "ray", *more)).out
    for file in ("result.json", "domains.json", "model.npz", "sidecar.parquet"):
        calm, ray = (tmp_path / run / "regroup" / file for run in ("calm", "ray"))
        assert calm.read_bytes() == ray.read_bytes(), file
