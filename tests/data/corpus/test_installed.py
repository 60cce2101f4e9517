"""The embedded corpus: enough domains, disjoint, and the same in every process."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from doremi_train.data.corpus import installed
from doremi_train.data.corpus.opening import BadLines
from doremi_train.data.corpus.reading import read
from doremi_train.data.corpus.sources import resolve
from doremi_train.data.options import DataOptions

PROJECT = Path(__file__).parents[3]
DIGEST = """
import hashlib, json, sys
from doremi_train.data.corpus import installed
digest = hashlib.sha256()
for domain in installed.domains():
    for split in ("train", "validation"):
        documents = installed.listing(domain, split, 0.03)
        read = [domain, split, installed.version(documents), *installed.texts(documents)]
        digest.update(json.dumps(read).encode())
print(digest.hexdigest(), "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def corpus() -> dict[tuple[str, str], list[tuple[str, str]]]:
    return {
        (domain, split): list(installed.texts(installed.listing(domain, split, 0.03)))
        for domain in installed.domains()
        for split in ("train", "validation")
    }


@pytest.mark.slow
def test_six_domains_of_300_kilobytes(corpus):
    sizes = {
        domain: sum(len(text.encode()) for _, text in corpus[domain, "train"])
        for domain in installed.domains()
    }
    assert len(sizes) >= 6
    assert min(sizes.values()) >= 300_000, sizes
    assert max(sizes.values()) > 2 * min(sizes.values())  # natural is not uniform


def test_documents_are_bounded_and_validation_is_there(corpus):
    for (domain, split), documents in corpus.items():
        assert all(installed.SHORTEST <= len(text) <= installed.DOCUMENT for _, text in documents)
        assert [name for name, _ in documents] == sorted(name for name, _ in documents)
        assert split == "train" or sum(len(text) for _, text in documents) > 10_000, domain


def test_no_domain_shares_a_file_with_another(corpus):
    owner: dict[str, str] = {}
    for (domain, split), documents in corpus.items():
        for name, _ in documents:
            assert owner.setdefault(name, f"{domain} {split}") == f"{domain} {split}"
            assert owner.setdefault(name.partition(":")[0] + " of", domain) == domain


def test_no_text_stands_in_two_domains(corpus):
    owner: dict[str, str] = {}
    for (domain, _), documents in corpus.items():
        for _, text in documents:
            assert owner.setdefault(hashlib.sha256(text.encode()).hexdigest(), domain) == domain


@pytest.mark.slow
def test_the_same_in_two_processes_without_torch():
    outputs = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(PROJECT)}
        outputs.append(
            subprocess.check_output(
                [sys.executable, "-c", DIGEST], env=environment, text=True
            ).split()
        )
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == "False"


def test_names_hold_no_machine_path(corpus):
    names = [name for documents in corpus.values() for name, _ in documents]
    assert not any(name.startswith("/") or str(Path.home()) in name for name in names)


def test_a_domain_without_its_files_is_left_out(monkeypatch):
    monkeypatch.setattr(installed, "_package", lambda name: None)
    installed._chosen.cache_clear()
    try:
        left = installed.domains()
    finally:
        installed._chosen.cache_clear()
    assert "cpp_headers" not in left
    assert "python_code" in left


def test_long_documents_end_with_a_line():
    text = "line\n" * 20_000
    assert installed._cut(text) == text[: installed.DOCUMENT]
    assert installed._cut("x" * 70_000) == "x" * installed.DOCUMENT
    assert installed._cut("short") == "short"


def test_read_as_sources():
    options = DataOptions()
    sources = resolve(options)
    assert {source.split for source in sources} == {"train", "validation"}
    assert len({source.domain for source in sources}) == len(installed.domains())
    assert all(source.size > 0 and source.version for source in sources)
    source = next(
        source for source in sources if source.url == "installed:unicode_names/validation"
    )
    pieces = list(read(source, options, BadLines(options)))
    assert pieces and all(piece.last and piece.domain == "unicode_names" for piece in pieces)
    assert json.loads(json.dumps(pieces[0].text)) == pieces[0].text
