"""findings.json of real runs: well-formed whatever stages there were; and what is planted in the
planted corpus, whose faults test_planted finds."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.corpus import documents, write_jsonl
from helpers.findings import diagnosed, well_formed
from helpers.sessions import opened

from doremi_train.data.corpus import planted
from doremi_train.data.sampler import Sampler
from doremi_train.evaluation import text
from doremi_train.stages import prepare, report
from doremi_train.stages.runs import budget, evaluated, reference

# Of any run


def test_a_short_run_on_ordinary_text_has_no_absurd_findings(
    tiny: list[str], tmp_path: Path
) -> None:
    found = diagnosed(*tiny, f"run_dir={tmp_path}")
    well_formed(tmp_path, found)
    assert not found
    reference = json.loads((tmp_path / "evaluation.json").read_text())["reference"]
    assert reference["training_loss"].keys() == reference["domains"].keys()
    assert all(1 < loss < 7 for loss in reference["training_loss"].values())


def test_a_mixture_that_was_not_learned_has_findings_too(tiny: list[str], tmp_path: Path) -> None:
    found = diagnosed(*tiny, f"run_dir={tmp_path}", "mixture=uniform", "main.comparisons=[]")
    well_formed(tmp_path, found)
    assert not found


@pytest.mark.parametrize("overrides", [(), ("proxy.match_repetition=true", "main.tokens=9000")])
def test_the_training_loss_is_that_of_sequences_the_reference_drew(
    overrides: tuple[str, ...], tiny: list[str], tmp_path: Path
) -> None:
    with opened(*tiny, f"run_dir={tmp_path}", *overrides) as session:
        store = prepare.run(session)
        domain, sequence = evaluated._trained_on(session, store)
        whole = store.sequences("train", session.config.training.sequence_length)
        weights, seed = reference.mixture(session, store).numpy(), session.config.seed
        sampler = Sampler(whole, store.domains, 8, seed, budget.subsample(session))
        counts, drawn = np.zeros_like(whole), set[tuple[int, int]]()
        for step in range(60):
            batch = sampler.draw(step, weights, counts)
            counts, drawn = (
                batch.counts,
                drawn | set(zip(batch.domain.tolist(), batch.sequence.tolist(), strict=True)),
            )
    assert set(zip(domain.tolist(), sequence.tolist(), strict=True)) <= drawn
    assert np.bincount(domain).tolist() == [4, 4, 4]


@pytest.mark.slow
def test_seeds_that_do_not_tell_their_weights_from_uniform(tiny: list[str], tmp_path: Path) -> None:
    found = diagnosed(
        *tiny, f"run_dir={tmp_path}", "proxy.seeds=2", "proxy.rounds=2", "main.comparisons=[]"
    )
    well_formed(tmp_path, found)
    assert [folder.parent.name for folder in report.proxies(tmp_path)] == ["round-2"] * 2
    # Of two seeds after 12 steps nobody can say anything.
    assert "seed_spread" in {finding.kind for finding in found}


@pytest.mark.slow
def test_a_reference_that_exists_already(
    tiny: list[str], tmp_path: Path, uninterrupted: Path
) -> None:
    given = f"reference.path={uninterrupted / 'reference' / 'model'}"
    found = diagnosed(*tiny, f"run_dir={tmp_path}", given, "main.comparisons=[]")
    well_formed(tmp_path, found)


@pytest.mark.slow
def test_a_batch_smaller_than_the_number_of_domains(tiny: list[str], tmp_path: Path) -> None:
    found = diagnosed(*tiny, f"run_dir={tmp_path}", "training.batch_size=2", "main.comparisons=[]")
    well_formed(tmp_path, found)
    (absent,) = [finding for finding in found if finding.kind == "absent"]
    assert absent.domains == ("digits", "plain", "rich") and absent.value == pytest.approx(
        1 / 3, abs=0.2
    )


@pytest.mark.slow
def test_a_reference_that_knows_a_small_domain_by_heart(tmp_path: Path, tiny: list[str]) -> None:
    root = tmp_path / "corpus"
    small = list(documents(7, "abcdefghijklmnopqrstuvwxyz", 3000, 8_000))
    write_jsonl(root / "small" / "train.jsonl", small[:2])
    write_jsonl(root / "small" / "validation.jsonl", small[2:])
    write_jsonl(
        root / "large" / "train.jsonl", documents(8, "abcdefghijklmnopqrstuvwxyz", 500, 400_000)
    )
    found = diagnosed(
        *tiny, f"data.root={root}", f"run_dir={tmp_path / 'run'}", "reference.mixture=uniform",
        "model.config.hidden_size=128", "model.config.intermediate_size=512",
        "training.learning_rate=0.003",
        "training.steps=300", "evaluation.every=100", "main.steps=2", "main.comparisons=[]",
    )  # fmt: skip
    well_formed(tmp_path / "run", found)
    assert [finding.domains for finding in found if finding.kind == "overfit"] == [("small",)]


def test_copied_text_is_found_wherever_it_stands() -> None:
    """Half of `c` is from `a`, at other places of its sequences; the languages are unlike."""
    generator = np.random.default_rng(0)
    a, b = (generator.integers(low, low + 200, size=(100, 65)) for low in (0, 200))
    c = generator.integers(400, 600, size=(100, 65))
    c[:50] = a.ravel()[7 : 7 + 50 * 65].reshape(50, 65)
    (found,) = text.of_the_text(("a", "b", "c"), [a, b, c])
    assert (
        found.kind == "duplicate"
        and found.domains == ("a", "c")
        and found.value == pytest.approx(0.3, abs=0.2)
    )
    assert not text.of_the_text(("a", "b"), [a, b])


def test_sequences_shorter_than_a_shingle() -> None:
    short = np.random.default_rng(0).integers(0, 1000, size=(3, 400, 9))
    assert not text.of_the_text(("a", "b", "c"), [*short])


# The planted corpus


def texts(domain: str) -> Iterator[str]:
    for split in ("train", "validation"):
        yield from planted.texts(domain, split, 0.03)


def test_the_planted_corpus_is_the_same_everywhere() -> None:
    assert planted.domains() == tuple(sorted(planted.domains()))
    for domain in planted.domains():
        written = list(texts(domain))
        assert len(set(written)) == len(written) >= 8  # no document twice
        assert 0.8 < sum(map(len, written)) / planted.size(domain) < 1.1
        assert all(text.isascii() and text for text in written)
    assert planted.texts("big", "train", 0.03)[0].startswith(
        "misunur cutnusce tihayerya zanaqet yotwarxel cohob"
    )


def test_what_is_alike_in_the_planted_corpus() -> None:
    def shared(one: str, other: str, length: int) -> float:
        """Part of the runs of so many words that stand in both, of those of the smaller one."""
        runs = []
        for domain in (one, other):
            words = [text.split() for text in texts(domain)]
            runs.append(
                {tuple(text[i : i + length]) for text in words for i in range(len(text) - length)}
            )
        return len(runs[0] & runs[1]) / min(map(len, runs))

    assert list(texts("copy")) == list(texts("easy"))
    assert not set(texts("twin_a")) & set(texts("twin_b"))
    assert shared("twin_a", "twin_b", 1) > 0.9 and shared("related_a", "related_b", 1) > 0.9
    # Words, not habits.
    assert shared("twin_a", "twin_b", 2) > 2 * shared("related_a", "related_b", 2)
    assert shared("twin_a", "big", 1) < 0.05


@pytest.mark.parametrize("fraction", [0.001, 0.03, 0.5, 0.999])
def test_a_part_of_the_planted_documents_is_for_validation(fraction: float) -> None:
    for domain in planted.domains():
        train, validation = (
            planted.texts(domain, "train", fraction),
            planted.texts(domain, "validation", fraction),
        )
        assert train and len(validation) >= min(planted.VALIDATION, len(train))
        assert not set(train) & set(validation)
