"""Selection of documents as a user meets it: what is chosen, written and refused, and what trains
on it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.command import TINY, environment, run_here, start
from helpers.corpus import documents, write_jsonl
from helpers.processes import documents_of

from doremi_train.data.tokens.shards import TokenStore
from doremi_train.selection.documents import choose

pytest.importorskip("numba")

HIDDEN = 30  # documents of the target's language in the domain `mixed`, of 200


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains: one language, and another that hides documents of a third."""
    root = tmp_path_factory.mktemp("raw")
    hidden = documents(3, "nopqrst", 300, HIDDEN * 400)
    write_jsonl(root / "plain" / "train-0.jsonl", documents(1, "abcdefgh", 200, 40_000))
    write_jsonl(root / "plain" / "train-1.jsonl", documents(11, "abcdefgh", 200, 20_000))
    write_jsonl(root / "mixed" / "train.jsonl", [*documents(2, "hijklmno", 200, 60_000), *hidden])
    return root


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stream = documents(3, "nopqrst", 300, 10**6)
    for _ in range(100):  # the same language, other text
        next(stream)
    return write_jsonl(
        tmp_path_factory.mktemp("target") / "target.jsonl", [next(stream) for _ in range(6)]
    )


def selecting(raw: Path, target: Path, run_dir: Path, *more: str) -> list[str]:
    given = {key: value for key, _, value in (override.partition("=") for override in more)}
    defaults = {
        "stage": "select", "data.root": str(raw), "selection": "ngram",
        "selection.targets": f"{{nopq: [{target}]}}",
        "run_dir": str(run_dir), "selection.workers": "1",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in (defaults | given).items()]


def chosen(run_dir: Path, name: str = "nopq") -> list[dict[str, Any]]:
    table = pq.read_table(run_dir / "select" / name / "sidecar.parquet")
    return [row for row in table.to_pylist() if row["selected"]]


def result(run_dir: Path) -> Any:
    return json.loads((run_dir / "select" / "result.json").read_text())


def ran(*overrides: str) -> Any:
    outcome = run_here(*overrides)
    assert outcome.code == 0, outcome
    return outcome


def test_hidden_documents_are_found_and_described(raw: Path, target: Path, tmp_path: Path) -> None:
    out = ran(*selecting(raw, target, tmp_path / "run", "selection.documents=25")).out
    texts = [json.loads(line)["text"] for line in (raw / "mixed" / "train.jsonl").open()]
    rows = chosen(tmp_path / "run")
    assert len(rows) == 25
    good = [
        row
        for row in rows
        if row["domain"] == "mixed" and not set(texts[row["row"]]) - set("nopqrst ")
    ]
    assert len(good) >= 23
    found = result(tmp_path / "run")["targets"]["nopq"]
    assert found["documents"] == 25 and found["tokens"] == sum(row["tokens"] for row in rows)
    assert (
        found["kl"]["reduction"] > 0.5
        and found["overlap_with_top_k"] > 0.8
        and found["effective_sample_size"] >= 1
    )
    assert sum(found["lengths"]["chosen"].values()) == 25
    assert len(found["examples"]["chosen"]) == len(found["examples"]["refused"]) == 3
    for word in (
        "effective sample size",
        "plain top-k",
        "KL from a half",
        "chosen",
        "refused",
        "of the domain",
    ):
        assert word in out
    weights = json.loads((tmp_path / "run" / "select" / "nopq" / "weights.json").read_text())
    tokens = Counter({"mixed": 0, "plain": 0})
    for row in rows:
        tokens[row["domain"]] += row["tokens"]
    assert weights["weights"] == {
        domain: n / tokens.total() for domain, n in sorted(tokens.items())
    }


def test_texts_and_names_that_look_like_markup_are_shown_as_they_are(
    target: Path, tmp_path: Path
) -> None:
    for name in ("[INST]", "[bold]:x:\x1b[2J"):
        texts = [f"[/INST] {text}" for text in documents(1, "abcdefgh", 200, 20_000)]
        write_jsonl(tmp_path / "raw" / name / "train.jsonl", texts)
    targets = tmp_path / "targets.json"
    targets.write_text(json.dumps({"[red]": [str(target)]}))
    given = [f"selection.targets={targets}", "selection.documents=5"]
    out = ran(*selecting(tmp_path / "raw", target, tmp_path / "run", *given)).out
    assert out.count("'[/INST] ") == 6 and "\n[red]: 5 documents" in out
    assert "\n  [INST] " in out and "\n  [bold]:x:\\x1b[2J " in out and "\x1b" not in out
    page = (tmp_path / "run" / "select" / "report.html").read_text()
    assert page.count("[/INST] ") >= 6 and "[bold]:x:\\x1b[2J" in page and "\x1b" not in page


@pytest.mark.slow
def test_other_budgets_seeds_and_temperatures_need_no_scoring_again(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    store = f"store={tmp_path / 'store'}"
    ran(*selecting(raw, target, tmp_path / "first", store))
    scores = sorted((tmp_path / "store" / "selection").glob("*/scores/*"))
    assert len(scores) == 3
    before = [path.stat().st_mtime_ns for path in scores]
    choices = [{(row["shard"], row["row"]) for row in chosen(tmp_path / "first")}]
    for name, overrides in (
        ("warm", ["selection.temperature=2.0"]),
        ("seed", ["selection.temperature=2.0", "seed=1"]),
        ("more", ["selection.tokens=9000"]),
    ):
        ran(*selecting(raw, target, tmp_path / name, store, *overrides))
        choices.append({(row["shard"], row["row"]) for row in chosen(tmp_path / name)})
    assert sorted((tmp_path / "store" / "selection").glob("*/scores/*")) == scores
    assert [path.stat().st_mtime_ns for path in scores] == before
    assert len({frozenset(choice) for choice in choices}) == 4


def test_budgets_in_tokens_hold_per_domain_and_in_all(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    store = f"store={tmp_path / 'store'}"
    cases = {
        "all": ("selection.tokens=3000", {}),
        "each": ("selection.tokens=2000 selection.within=domain", {"mixed": 2000, "plain": 2000}),
        "named": ("selection.tokens={mixed: 1500, plain: 0}", {"mixed": 1500, "plain": 0}),
    }
    for name, (overrides, limits) in cases.items():
        split = [overrides] if "{" in overrides else overrides.split()
        ran(*selecting(raw, target, tmp_path / name, store, *split))
        tokens = Counter[str]()
        for row in chosen(tmp_path / name):
            tokens[row["domain"]] += row["tokens"]
        if not limits:
            assert 3000 - 100 < tokens.total() <= 3000
        for domain, limit in limits.items():
            assert max(0, limit - 100) <= tokens[domain] <= limit


@pytest.mark.slow
def test_the_choice_is_the_same_for_any_workers_and_sharding(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    for domain in ("plain", "mixed"):
        texts = [line for path in sorted((raw / domain).iterdir()) for line in path.open()]
        for part in range(3):  # other files, another order, compressed
            path = again / domain / f"train-{part}.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zstandard.compress("".join(texts[::-1][part::3]).encode()))
    ids = []
    for name, root, workers in (("one", raw, 1), ("other", again, 2)):
        ran(
            *selecting(
                root,
                target,
                tmp_path / name,
                f"selection.workers={workers}",
                "selection.temperature=1.0",
            )
        )
        ids.append(sorted(row["id"] for row in chosen(tmp_path / name)))
    assert ids[0] == ids[1]


@pytest.mark.slow
def test_copies_draw_noise_of_their_own(target: Path, tmp_path: Path) -> None:
    texts = [*documents(5, "abcdefgh", 200, 40_000)]
    copies = [texts[0]] * 60
    write_jsonl(tmp_path / "raw" / "web" / "train.jsonl", [*texts[:60], *copies])
    taken = []
    for seed in range(6):
        more = ("selection.documents=30", "selection.temperature=1000", f"seed={seed}")
        store = f"store={tmp_path / 'store'}"
        ran(*selecting(tmp_path / "raw", target, tmp_path / f"{seed}", *more, store))
        ids = Counter(row["id"] for row in chosen(tmp_path / f"{seed}"))
        taken.append(ids.most_common(1)[0][1])
    assert all(7 < count < 24 for count in taken) and len(set(taken)) > 1, taken  # of 30, half


def test_ids_are_numbered_in_any_memory(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 30, 500).astype(np.uint64)
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    for file, part in zip(files, np.split(ids, [0, 200]), strict=True):  # the first is empty
        pq.write_table(pa.table({"id": part}), file)
    before = [int((ids[:n] == ids[n]).sum()) for n in range(len(ids))]
    for most in (7, 10**6):
        choose.number_copies(files, tmp_path / f"{most}.npy", most)
        assert np.load(tmp_path / f"{most}.npy", mmap_mode="r").tolist() == before
    choose.number_copies(files[:1], tmp_path / "none.npy")
    assert len(np.load(tmp_path / "none.npy", mmap_mode="r")) == 0


def test_rows_are_those_of_the_file(target: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in documents(5, "abcdefghé", 200, 20_000)]
    lines[3:3] = ['{"text": ""}', "", '{"text": cut']
    (tmp_path / "raw" / "web").mkdir(parents=True)
    (tmp_path / "raw" / "web" / "train.jsonl").write_text("\n".join(lines))
    common = ["data.max_bad_lines=1", "selection.documents=20"]
    ran(*selecting(tmp_path / "raw", target, tmp_path / "run", *common))
    sidecar = tmp_path / "run/select/nopq/sidecar.parquet"
    rows = chosen(tmp_path / "run")
    texts = [
        json.loads(lines[row["row"]])["text"].encode()[row["start"] : row["end"]].decode()
        for row in rows
    ]
    assert max(row["row"] for row in rows) > 6 and all(row["start"] == 0 for row in rows)
    assert b"bytes" in pq.read_schema(sidecar).metadata[b"offsets"]
    given = [f"data.root={tmp_path / 'raw'}", f"data.selection={sidecar}", common[0]]
    ran(*TINY, *given, f"run_dir={tmp_path / 'train'}", "stage=prepare")
    store = TokenStore.open(tmp_path / "train/prepare")
    assert sorted(documents_of(store, "train", "web")) == sorted(texts)


def test_long_documents_are_cut_and_their_parts_are_those_of_the_text(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    ran(
        *selecting(raw, target, tmp_path / "run", "selection.chunk=20", "selection.write=jsonl.zst")
    )
    texts = [json.loads(line)["text"] for line in (raw / "mixed" / "train.jsonl").open()]
    rows = pq.read_table(tmp_path / "run/select/nopq/sidecar.parquet").to_pylist()
    for number, text in enumerate(texts):
        parts = [row for row in rows if row["domain"] == "mixed" and row["row"] == number]
        if parts:  # not for validation
            content = text.encode()
            assert "".join(content[part["start"] : part["end"]].decode() for part in parts) == text
            assert sum(part["tokens"] for part in parts) == len(text.split())
            assert max(part["tokens"] for part in parts) <= 20
    wanted = Counter(
        texts[row["row"]].encode()[row["start"] : row["end"]].decode()
        for row in rows if row["selected"] and row["domain"] == "mixed"
    )  # fmt: skip
    path = tmp_path / "run/select/nopq/shards/mixed/train-00000.jsonl.zst"
    written = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().decode()
    assert Counter(json.loads(line)["text"] for line in written.splitlines()) == wanted


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_chosen_text_is_a_data_root(raw: Path, target: Path, tmp_path: Path, form: str) -> None:
    budget = ("selection.fraction=0.5", "selection.within=domain")
    ran(*selecting(raw, target, tmp_path / "run", f"selection.write={form}", *budget))
    root = tmp_path / "run" / "select" / "nopq" / "shards"
    ran(
        "stage=prepare",
        f"data.root={root}",
        f"run_dir={tmp_path / 'train'}",
        *TINY,
        "data.validation_fraction=0.2",
    )
    manifest = json.loads((tmp_path / "train" / "prepare" / "manifest.json").read_text())
    read = sum(
        split["documents"] for domain in manifest["domains"].values() for split in domain.values()
    )
    assert read == len(chosen(tmp_path / "run"))


def test_a_run_selects_and_trains_on_the_choice_with_the_validation_of_all(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    common = ["stage=prepare", *TINY, f"store={tmp_path / 'store'}"]
    ran(*common, f"data.root={raw}", f"run_dir={tmp_path / 'all'}")
    budget = ("selection.fraction=0.3", "selection.within=domain")
    ran(*selecting(raw, target, tmp_path / "own", *common, *budget))
    sidecar = tmp_path / "own/select/nopq/sidecar.parquet"
    ran(*common, f"data.root={raw}", f"run_dir={tmp_path / 'given'}", f"data.selection={sidecar}")
    every, own, given = (
        json.loads((tmp_path / name / "prepare/manifest.json").read_text())
        for name in ("all", "own", "given")
    )
    assert own["fingerprint"] == given["fingerprint"]
    parts = Counter(row["domain"] for row in chosen(tmp_path / "own"))
    for domain in ("mixed", "plain"):
        assert own["domains"][domain]["train"]["documents"] == parts[domain]
        for key in ("documents", "bytes"):
            assert (
                own["domains"][domain]["validation"][key]
                == every["domains"][domain]["validation"][key]
            )
    assert (
        own["domains"]["mixed"]["train"]["bytes"]
        < 0.35 * every["domains"]["mixed"]["train"]["bytes"]
    )


@pytest.mark.acceptance
def test_doremi_over_domains_trains_on_the_choice_within_each(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    """One command: the budget of every domain is chosen from, DoReMi weighs what was chosen, and
    the final models train on it by these weights."""
    budgets = {"mixed": 3000, "plain": 5000}
    run_dir = tmp_path / "run"
    budget = f"selection.tokens={{mixed: {budgets['mixed']}, plain: {budgets['plain']}}}"
    ran(*selecting(raw, target, run_dir, "stage=pipeline", budget, *TINY))

    texts = {
        path: [json.loads(line)["text"] for line in path.open()] for path in raw.glob("*/*.jsonl")
    }
    expected: dict[str, list[str]] = {domain: [] for domain in budgets}
    tokens = Counter[str]()
    for row in chosen(run_dir):
        expected[row["domain"]].append(texts[raw / row["shard"]][row["row"]])
        tokens[row["domain"]] += row["tokens"]
    store = TokenStore.open(run_dir / "prepare")
    for domain, most in budgets.items():
        assert most - 100 < tokens[domain] <= most
        assert sorted(documents_of(store, "train", domain)) == sorted(expected[domain])

    mixture = json.loads((run_dir / "weights.json").read_text())
    weights = mixture["weights"]
    steps = [
        json.loads(line)["weights"] for line in (run_dir / "proxy" / "domain_weights.jsonl").open()
    ]
    assert mixture["method"] == "doremi" and len(steps) == mixture["provenance"]["steps"] == 12
    assert abs(sum(weights.values()) - 1) < 1e-9
    assert weights == pytest.approx(
        {domain: np.mean([step[domain] for step in steps]) for domain in budgets}, abs=1e-9
    )
    assert mixture["provenance"]["data"] == store.fingerprint
    # Of the choice, not of all.
    for domain, size in zip(store.domains, store.sizes("train"), strict=True):
        assert mixture["epochs"][domain] == pytest.approx(weights[domain] * 12 * 8 * 32 / size)
    evaluated = json.loads((run_dir / "evaluation.json").read_text())
    assert {"reference", "baseline", "main"} <= evaluated.keys()
    assert all(model["domains"].keys() == budgets.keys() for model in evaluated.values())
    assert (run_dir / "report.html").exists()


def test_a_domain_without_a_chosen_document_is_left_out(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    choice = ("selection.documents=20", "selection.temperature=0")
    ran(*selecting(raw, target, tmp_path / "run", *choice, "stage=prepare", *TINY))
    manifest = json.loads((tmp_path / "run/prepare/manifest.json").read_text())
    assert list(manifest["domains"]) == ["mixed"]


def test_copies_of_targets_and_benchmarks_are_refused(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    texts = [json.loads(line)["text"] for line in (raw / "mixed" / "train.jsonl").open()]
    # Thirteen words of a document.
    asked = "what does " + " ".join(texts[5].split()[10:23]) + " mean"
    near = "what does " + " ".join(texts[6].split()[10:22]) + " mean"  # twelve
    benchmark = write_jsonl(tmp_path / "benchmark.jsonl", [asked, near])
    copies = write_jsonl(
        tmp_path / "target.jsonl",
        [*map(str, (json.loads(t)["text"] for t in target.open())), texts[7]],
    )
    ran(*selecting(raw, copies, tmp_path / "run", f"selection.benchmarks=[{benchmark}]"))
    why = {
        row["row"]: row["refused"]
        for row in pq.read_table(tmp_path / "run/select/nopq/sidecar.parquet").to_pylist()
        if row["domain"] == "mixed"
    }
    assert [why.get(number, "validation") for number in (5, 6, 7)] == ["benchmark", None, "copy"]
    assert result(tmp_path / "run")["refused"] == {"short": 0, "copy": 1, "benchmark": 1}


def test_exact_scores_are_sums_over_whole_documents(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    from doremi_train.methods import ngram

    overrides = ("selection.exact=true", "selection.documents=5", "selection.min_tokens=30")
    error = run_here(*selecting(raw, target, tmp_path / "short", *overrides))
    # 60 words each, and the package wants 100.
    assert error.code == 2 and "only 0 eligible" in error.err
    long = tmp_path / "raw" / "d" / "train.jsonl"
    texts = [
        a + " " + b for a, b in zip(*[documents(2, "hijklmno", 200, 20_000)] * 2, strict=False)
    ]
    write_jsonl(long, texts)
    ran(*selecting(long.parents[1], target, tmp_path / "run", *overrides))
    rows = pq.read_table(tmp_path / "run/select/nopq/sidecar.parquet").to_pylist()
    kept = [texts[row["row"]] for row in rows]
    served = [json.loads(line)["text"] for line in target.open()]
    counts = [
        np.bincount(
            np.concatenate([ngram.exact_buckets(text, 10_000) for text in side]), minlength=10_000
        )
        for side in (served, kept)
    ]
    ratio = ngram.log_ratio(*counts)
    expected = [ratio[ngram.exact_buckets(text, 10_000)].sum() for text in kept]
    np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=0, atol=1e-9)


def test_token_ids_need_no_text_and_serve_as_words_do(
    raw: Path, target: Path, tmp_path: Path
) -> None:
    ran("stage=prepare", f"data.root={raw}", f"run_dir={tmp_path / 'tokens'}", *TINY)
    tokenizer = tmp_path / "tokens" / "prepare" / "tokenizer.json"
    features = (
        "selection.features=tokens",
        f"selection.tokenizer={tokenizer}",
        "selection.documents=20",
    )
    ran(*selecting(raw, target, tmp_path / "run", *features))
    texts = [json.loads(line)["text"] for line in (raw / "mixed" / "train.jsonl").open()]
    rows = chosen(tmp_path / "run")
    assert (
        sum(
            not set(texts[row["row"]]) - set("nopqrst ") for row in rows if row["domain"] == "mixed"
        )
        >= 18
    )
    from tokenizers import Tokenizer

    row = next(row for row in rows if row["domain"] == "mixed")
    assert row["tokens"] == len(Tokenizer.from_file(str(tokenizer)).encode(texts[row["row"]]).ids)


def test_several_targets_are_served_in_one_pass(raw: Path, target: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", list(documents(1, "abcdefgh", 200, 3000)))
    targets = f"selection.targets={{nopq: [{target}], abc: [{other}]}}"
    ran(
        *selecting(
            raw,
            target,
            tmp_path / "run",
            targets,
            "selection.documents=20",
            "selection.overlap=1.0",
        )
    )
    assert {row["domain"] for row in chosen(tmp_path / "run", "abc")} == {"plain"}
    assert {row["domain"] for row in chosen(tmp_path / "run", "nopq")} == {"mixed"}
    error = run_here(*selecting(raw, target, tmp_path / "train", targets, "stage=prepare", *TINY))
    assert error.code == 2 and "selection.train=None" in error.err and "abc" in error.err


# ── What is wrong is said, and leaves nothing half-written ──────────────────────────


def broken(path: Path) -> Path:
    with path.open("a") as file:
        file.write('{"text": "cut o\n\n')
    return path


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["selection.documents=100000"], ["selection.documents=100000", "only", "eligible"]),
        (
            ["selection.documents=20", "selection.targets={t: [RAW/mixed/*, RAW/plain/*]}"],
            ["has only 0 eligible", "refused as copies of the target (selection.overlap=0.5)"],
        ),
        (["selection.tokens={plain: 5}"], ["selection.tokens", "mixed"]),
        (
            ["selection.tokens=5", "selection.fraction=0.1"],
            ["selection.tokens and selection.fraction"],
        ),
        (["selection.fraction=1.5"], ["selection.fraction"]),
        (["selection.min_tokens=500"], ["nothing is asked for"]),
        (["selection.features=tokens"], ["selection.tokenizer=None"]),
        (["selection.targets=null"], ["selection.targets: missing"]),
        (["selection.targets={a/b: [x.jsonl]}"], ["selection.targets.a/b"]),
        (["selection.targets={result.json: [x.jsonl]}"], ["selection.targets.result.json"]),
        (["selection.targets={t: [no/such.jsonl]}"], ["selection.targets.t", "no/such.jsonl"]),
        (["selection.targets={t: [EMPTY]}"], ["selection.targets.t: no document"]),
        (["selection.benchmarks=[EMPTY]"], ["selection.benchmarks: no document"]),
        (["data.root=BROKEN"], ["line", "broken JSON"]),
        (["data.root=TORN"], ["train.jsonl.zst", "truncated or corrupt"]),
        (
            ["data.root=HOLLOW", "selection.within=domain"],
            ["no eligible document in domain hollow"],
        ),
        (["selection.granularity=every"], ["selection.features=granular"]),
        (["selection=none"], ["selection=ngram"]),
    ],
)
def test_mistakes(
    overrides: list[str], said: list[str], raw: Path, target: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    torn = zstandard.compress(b'{"text": "some words that are here"}\n' * 100)[:-5]
    (tmp_path / "torn" / "d").mkdir(parents=True)
    (tmp_path / "torn" / "d" / "train.jsonl.zst").write_bytes(torn)
    broken(write_jsonl(tmp_path / "broken" / "d" / "train.jsonl", documents(2, "hijk", 20, 2000)))
    write_jsonl(tmp_path / "hollow" / "d" / "train.jsonl", documents(2, "hijk", 20, 2000))
    write_jsonl(tmp_path / "hollow" / "hollow" / "train.jsonl", [""])
    places = {
        "RAW": str(raw),
        "EMPTY": "empty.jsonl",
        "BROKEN": "broken",
        "TORN": "torn",
        "HOLLOW": "hollow",
    }
    for word, name in places.items():
        overrides = [override.replace(word, str(tmp_path / name)) for override in overrides]
    outcome = run_here(*selecting(raw, target, tmp_path / "run", *overrides))
    assert outcome.code == 2, outcome
    for word in said:
        assert word in outcome.err
    assert not list((tmp_path / "run").rglob("sidecar.parquet")) and not list(
        tmp_path.rglob("*.partial")
    )


def test_broken_lines_may_be_skipped_and_are_counted(target: Path, tmp_path: Path) -> None:
    path = broken(
        write_jsonl(tmp_path / "raw" / "d" / "train.jsonl", documents(2, "hijk", 20, 9000))
    )
    ran(*selecting(path.parents[1], target, tmp_path / "run", "data.max_bad_lines=1"))
    assert result(tmp_path / "run")["bad_lines"] == 1


def test_a_sidecar_of_other_files_is_refused(raw: Path, target: Path, tmp_path: Path) -> None:
    ran(*selecting(raw, target, tmp_path / "run"))
    write_jsonl(tmp_path / "raw" / "d" / "train.jsonl", documents(2, "hijk", 20, 9000))
    sidecar = tmp_path / "run/select/nopq/sidecar.parquet"
    for name, selection, said in (
        ("other", sidecar, "other files"),
        ("no", target, "not a sidecar"),
    ):
        outcome = run_here(
            "stage=prepare", f"data.root={tmp_path / 'raw'}", f"data.selection={selection}", *TINY,
            f"run_dir={tmp_path / name}",
        )  # fmt: skip
        assert outcome.code == 2 and said in outcome.err, outcome


# ── Memory ──────────────────────────────────────────────────────────────────────────


@pytest.mark.acceptance
@pytest.mark.parametrize(("form", "small", "large"), [("txt", 4, 10), ("jsonl", 1, 5)])
def test_memory_does_not_grow_with_a_file(
    form: str, small: int, large: int, target: Path, tmp_path: Path
) -> None:
    """Peak of the whole command on so many times 6 MB of text: as one document (.txt), and as 100
    000 each time."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("peak memory is read from /proc, as ru_maxrss counts the parent's too")
    program = (
        "import re; from pathlib import Path; from doremi_train.__main__ import main\n"
        "try: main()\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    text = " ".join(documents(2, "hijklmno", 2000, 6_000_000))
    lines = "".join(f'{{"text": "{text[at : at + 60]}"}}\n' for at in range(0, len(text), 60))
    peaks = []
    for times in (small, large):
        root = tmp_path / str(times)
        (root / "d").mkdir(parents=True)
        with (root / "d" / f"train.{form}").open("w") as file:
            file.writelines(text + "\n" if form == "txt" else lines for _ in range(times))
        (root / "d" / "validation.jsonl").write_text('{"text": "some"}\n')
        command = selecting(root, target, tmp_path / f"run-{times}", "selection.documents=100")
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 64, peaks


# ── Kills ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Files enough to be met at work."""
    texts = list(documents(2, "hijklmno", 200, 200_000))
    for number in range(24):
        write_jsonl(tmp_path / "many" / "d" / f"train-{number:02d}.jsonl", texts[number::24] * 20)
    return tmp_path / "many"


def children(pid: int) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            line = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == pid and b"spawn_main" in line:
            yield int(path.parent.name)


@pytest.mark.acceptance
def test_killed_workers_and_a_killed_command_change_nothing(
    many: Path, target: Path, tmp_path: Path
) -> None:
    ran(*selecting(many, target, tmp_path / "calm"))
    started = start(*selecting(many, target, tmp_path / "killed", "selection.workers=2"))
    killed = 0
    while started.poll() is None and killed < 3:
        time.sleep(2)
        for worker in children(started.pid):
            os.kill(worker, signal.SIGKILL)
            killed += 1
            break
    assert killed
    started.communicate(timeout=200)
    assert started.returncode == 0
    stopped = start(*selecting(many, target, tmp_path / "stopped"))
    while not list((tmp_path / "stopped").rglob("scores/*.parquet")):
        time.sleep(0.05)
    stopped.kill()
    stopped.wait()
    assert not (tmp_path / "stopped" / "select" / "result.json").exists()
    ran(*selecting(many, target, tmp_path / "stopped"))
    calm = pq.read_table(tmp_path / "calm/select/nopq/sidecar.parquet")
    for name in ("killed", "stopped"):
        assert pq.read_table(tmp_path / name / "select/nopq/sidecar.parquet").equals(calm)
        assert result(tmp_path / name) == result(tmp_path / "calm")


# ── Engines ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ray_nodes(alone_with_ray: None) -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, which a command finds by RAY_ADDRESS; workers
    find this checkout."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        node = {"num_cpus": 1, "object_store_memory": 80_000_000}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            cluster.add_node(**node)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


def working(name: str) -> list[int]:
    """Processes that Ray has at a task of this name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(f"ray::{name}".encode()):
                found.append(int(path.parent.name))
    return found


@pytest.mark.acceptance
def test_a_ray_cluster_that_loses_workers_and_a_node_gives_the_same_bytes(
    many: Path, target: Path, ray_nodes: Any, tmp_path: Path
) -> None:
    ran(*selecting(many, target, tmp_path / "calm"))
    started = start(*selecting(many, target, tmp_path / "ray", "selection.engine=ray"))
    killed = 0
    while started.poll() is None and killed < 2:
        for worker in working("count")[:1]:
            os.kill(worker, signal.SIGKILL)
            killed += 1
            time.sleep(2)
    assert killed == 2
    while started.poll() is None and not working("score"):
        time.sleep(0.01)
    ray_nodes.remove_node(next(iter(ray_nodes.worker_nodes)), allow_graceful=False)
    out, err = started.communicate(timeout=200)
    assert started.returncode == 0, (out, err)
    assert "Ray of 2 nodes" in out
    calm, ray = (tmp_path / name / "select" for name in ("calm", "ray"))
    for name in ("result.json", "nopq/sidecar.parquet", "nopq/weights.json"):
        assert (calm / name).read_bytes() == (ray / name).read_bytes(), name
