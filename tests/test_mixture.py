"""weights.json: exact there and back, every mistake named, intervals that agree with scipy."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from doremi_train import mixture
from doremi_train import mixture as artefact
from doremi_train.config import UserError
from doremi_train.evaluation import statistics
from doremi_train.mixture import Mixture

DOMAINS = ("a", "b")
REDPAJAMA = {  # as published: sums to 0.9999
    "common_crawl": 0.7256, "c4": 0.1446, "github": 0.0488, "wikipedia": 0.0198, "book": 0.0215,
    "arxiv": 0.0231, "stackexchange": 0.0165,
}  # fmt: skip


def written(folder: Path, content: Any) -> Path:
    path = folder / "weights.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_weights_are_written_exactly_and_read_back_as_a_mixture(tmp_path: Path) -> None:
    values = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = dict(zip("abcdefg", (values / values.sum()).tolist(), strict=True))
    mixture = Mixture(
        "doremi", given, interval={"a": (0.1, 0.2)}, epochs={"a": 1.5}, provenance={"seed": 0}
    )
    artefact.save(tmp_path / "weights.json", mixture)
    # Every bit of it.
    assert json.loads((tmp_path / "weights.json").read_text())["weights"] == given
    loaded = artefact.load(tmp_path / "weights.json", tuple("abcdefg"))
    assert loaded.method == "doremi"
    assert list(loaded.weights.values()) == pytest.approx(list(given.values()), rel=1e-15)
    assert abs(math.fsum(loaded.weights.values()) - 1) < 1e-9


def test_the_file_is_the_one_others_rely_on(tmp_path: Path) -> None:
    mixture.save(
        tmp_path / "weights.json",
        Mixture("doremi", {"a": 0.25, "b": 0.75}, interval={"a": (0.1, 0.4)}),
    )
    content = json.loads((tmp_path / "weights.json").read_text())
    assert content == {
        "schema": 1, "unit": "token", "method": "doremi", "weights": {"a": 0.25, "b": 0.75},
        "interval": {"a": [0.1, 0.4]}, "epochs": {}, "provenance": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        {"a": 0.25, "b": 0.75},
        {"weights": {"b": 0.75, "a": 0.25}, "schema": 1},
        {
            "train_domain_weights": {"a": 0.25, "b": 0.75},
            "eval_domain_weights": {"a": 0.5, "b": 0.5},
        },
    ],
)
def test_our_own_a_plain_and_the_original_form_are_read(tmp_path: Path, content: Any) -> None:
    assert mixture.load(written(tmp_path, content), DOMAINS).weights == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize("total", [0.9996, 1.0001])
def test_the_original_s_published_files_are_rounded(tmp_path: Path, total: float) -> None:
    content = {"train_domain_weights": {"a": 0.25 * total, "b": 0.75 * total}}
    weights = mixture.load(written(tmp_path, content), DOMAINS).weights
    assert weights == pytest.approx({"a": 0.25, "b": 0.75}) and sum(weights.values()) == 1
    with pytest.raises(UserError, match="not 1"):  # of our own that is a mistake
        mixture.load(written(tmp_path, {"weights": content["train_domain_weights"]}), DOMAINS)
    with pytest.raises(UserError, match="not 1"):
        far = {"train_domain_weights": {"a": 0.25, "b": 0.7}}
        mixture.load(written(tmp_path, far), DOMAINS)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"a": 0.5, "b": 0.3, "c": 0.2}, "unknown domain 'c'"),
        ({"a": 1.0}, "no weight for b"),
        ({"a": 1.5, "b": -0.5}, "weight of 'b' is -0.5"),
        ('{"a": 1.0, "b": NaN}', "weight of 'b' is nan"),
        ('{"a": 1.0, "b": Infinity}', "weight of 'b' is inf"),
        ({"a": True, "b": 0}, "weight of 'a' is True"),
        ({"a": "1", "b": 0}, "weight of 'a' is '1'"),
        ({"a": 0.5, "b": 0.4}, "sum to 0.9, not 1"),
        ({"a": 0, "b": 0}, "sum to 0, not 1"),
        ([0.5, 0.5], "must hold"),
        ('{"a": 0.5', "not a JSON file"),
    ],
)
def test_every_mistake_is_one_message_that_names_it(
    tmp_path: Path, content: Any, named: str
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(UserError) as error:
        mixture.load(path, DOMAINS)
    assert named in str(error.value) and str(error.value).startswith(f"mixture.path={path}: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing.json"):
        mixture.load(tmp_path / "nothing.json", DOMAINS)


def test_published_weights_are_read_when_told_to_normalise(tmp_path: Path) -> None:
    path, names = written(tmp_path, REDPAJAMA), tuple(REDPAJAMA)
    with pytest.raises(UserError, match=r"mixture\.normalize=true"):
        mixture.load(path, names)
    loaded = mixture.load(path, names, normalize=True)
    assert math.fsum(loaded.weights.values()) == pytest.approx(1, abs=1e-12)
    assert loaded.weights["c4"] == pytest.approx(0.1446 / 0.9999)


def test_weights_that_are_all_zero_cannot_be_normalised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sum to 0"):
        mixture.load(written(tmp_path, {"a": 0, "b": 0}), DOMAINS, normalize=True)


def test_weights_go_to_tensors_in_the_order_of_the_data() -> None:
    assert Mixture("file", {"a": 0.25, "b": 0.75}).tensor(("b", "a")).tolist() == [0.75, 0.25]


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_student_t_agrees_with_scipy(level: float) -> None:
    values = [0.31, 0.28, 0.35, 0.30, 0.27]
    mean, half = statistics.student_t(values, level)
    low, high = stats.t.interval(level, len(values) - 1, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_one_value_has_no_interval() -> None:
    assert statistics.student_t([0.3]) == (0.3, math.inf)
    mean, interval = statistics.summarize([torch.tensor([0.4, 0.6])])
    assert interval is None and mean.tolist() == pytest.approx([0.4, 0.6])


def test_several_seeds_give_their_mean_and_an_interval_within_zero_and_one() -> None:
    samples = [
        torch.tensor(w, dtype=torch.float64) for w in ([0.01, 0.99], [0.05, 0.95], [0.0, 1.0])
    ]
    mean, interval = statistics.summarize(samples)
    assert mean.tolist() == pytest.approx([0.02, 0.98]) and interval is not None
    low, high = interval
    assert bool(
        (low >= 0).all() and (high <= 1).all() and (low <= mean).all() and (mean <= high).all()
    )
    assert float(high[0]) == pytest.approx(0.02 + statistics.student_t([0.01, 0.05, 0.0])[1])
