"""Exports are judged by draws: data in the trainer's own format, its dataset built from our file,
and more samples counted than the smallest source has, many times over."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from helpers.command import ROOT

from doremi_train.config import UserError
from doremi_train.exports import convert
from doremi_train.exports.formats import FORMATS

# The smallest source is read many times; others have a small weight, or next to none, or none.
WEIGHTS = {"web": 0.62, "small one": 0.37, "it's odd, 1": 0.00999, "rare": 1e-5, "none": 0.0}
SAMPLES = {"web": 600, "small one": 40, "it's odd, 1": 200, "rare": 500}
ENDINGS = {"webdataset": ".tar", "torchtitan": ".jsonl"}
# What `datasets` may be given: files of several kinds, and a folder of them.
KINDS = {"web": ".jsonl", "small one": ".parquet", "it's odd, 1": "", "rare": ".jsonl.gz"}
DRAWS = {
    "megatron": ["alone"],
    "webdataset": ["alone", "workers", "ranks"],
    "datasets": ["alone", "workers", "ranks"],
    "mosaicml_streaming": ["workers", "again", "ranks"],
    "torchtitan": ["alone", "workers", "ranks"],
    "litdata": ["alone", "loader", "workers", "ranks"],
    "energon": ["alone", "workers", "ranks"],
    "llama_factory": ["streamed"],
    "maxtext": ["alone", "ranks"],
    "olmo_core_composable": ["alone", "ranks"],
}


def as_they_weigh(drawn: Mapping[str, int], same: int = 1) -> None:
    """Every share is its weight but for chance; `same` processes made the same draws."""
    total = sum(drawn.values())
    assert total >= 2000, drawn
    for name, weight in WEIGHTS.items():
        chance = 5 * math.sqrt(total * same * weight * (1 - weight))
        assert abs(drawn.get(name, 0) - total * weight) <= chance + 2, (name, drawn)


def exported(to: str, folder: Path) -> None:
    """The mixture for the target `to`, and where its script makes the data: paths with spaces."""
    data = folder / "my data"
    if to == "megatron":  # which splits at spaces
        data = folder / "data"
    data.mkdir()
    signs = {"megatron": " ", "llama_factory": ","}.get(to, "")  # where it splits
    files = {name: name.replace(signs, "_") if signs else name for name in SAMPLES}
    endings = KINDS if to == "datasets" else dict.fromkeys(SAMPLES, ENDINGS.get(to, ""))
    paths = {name: f"{data / file}{endings[name]}" for name, file in files.items()}
    epochs = {name: 4000 * WEIGHTS[name] / samples for name, samples in SAMPLES.items()}
    made = {name: [paths[name], samples] for name, samples in SAMPLES.items()}
    (folder / "domains.json").write_text(json.dumps(made))
    drawn = convert.shares(WEIGHTS, None, FORMATS[to].zeros)
    for form in ("megatron", "nemo") if to == "megatron" else (to,):
        file = folder / f"mixture.{FORMATS[form].ending}"
        file.write_text(convert.write(form, drawn, paths, epochs))


def peers() -> str:
    python = os.environ.get("DOREMI_PEERS")
    if not python:
        pytest.skip("DOREMI_PEERS names no Python with the packages that .ci/run installs for it")
    return python


def run(python: str, *arguments: object) -> dict[str, Counter[str]]:
    """What the script counted, {setting: {domain: draws}}."""
    command = [python, "-W", "ignore", str(ROOT / "tests" / "helpers" / "peers.py")]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Counter[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.acceptance
@pytest.mark.parametrize("to", DRAWS)
def test_the_real_loader_draws_as_the_weights_say(to: str, tmp_path: Path) -> None:
    """In an environment of their own, since their pins disagree with ours and each other's."""
    exported(to, tmp_path)
    found = run(sys.executable if to == "webdataset" else peers(), to, tmp_path)
    assert found.keys() >= set(DRAWS[to])
    for setting in DRAWS[to]:
        # Ranks and workers of some draw the same sources, each from its own part of the data.
        as_they_weigh(found[setting], 2 if to in ("litdata", "torchtitan") else 1)
    if to == "megatron":
        assert found["nemo"] == {"same": True}  # the other file is the same to Megatron
    if "resumed" in found:
        assert found["resumed"] == {"same": 300}
    if to == "maxtext":  # with one pass, the data ends where the first source does
        assert found["once"]["small one"] == 40 and sum(found["once"].values()) < 200
    if "first" in found:  # sources are mixed, and not one after another
        assert len(found["first"]) > 1


def test_webdataset_shares_one_tar_among_ranks_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four readers together see every sample of a source once in each of its passes."""
    webdataset = pytest.importorskip("webdataset")
    exported("webdataset", tmp_path)
    path = tmp_path / "my data" / "small one.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(3):  # fewer than readers
            writer.write({"__key__": f"{number}", "txt": "small one"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mixture", raising=False)
    import mixture  # type: ignore[import-not-found]

    seen: Counter[str] = Counter()
    for rank in range(2):
        for worker in range(2):
            place = {"RANK": rank, "WORLD_SIZE": 2, "WORKER": worker, "NUM_WORKERS": 2}
            for name, value in place.items():
                monkeypatch.setenv(name, str(value))
            source = iter(mixture.Source(str(path)))
            seen.update(next(source)["__key__"] for _ in range(6))
    assert seen == {"0": 8, "1": 8, "2": 8}


def test_llama_factory_and_maxtext_refuse_what_they_would_read_otherwise() -> None:
    drawn = convert.shares({"a": 0.3, "b": 0.7}, None)
    for to, path, said in (
        ("llama_factory", "one, two", "splits at commas"),
        ("llama_factory", " one", "cuts spaces"),
        ("maxtext", "s3://bucket/a", "gs://"),
    ):
        with pytest.raises(UserError, match=said):
            convert.write(to, drawn, {"a": path, "b": "/d/b"}, {})
    convert.write("maxtext", drawn, {"a": "gs://bucket/a*", "b": "/d/b"}, {})
    with pytest.raises(UserError, match=r"export\.paths\.a,b='a,b': LLaMA-Factory"):
        convert.write("llama_factory", {"a,b": 1.0}, {}, {})


# Forms


def test_zeros_are_there_where_the_original_looks_them_up() -> None:
    drawn = convert.shares({"a": 0.3, "b": 0.7, "c": 0.0}, None, FORMATS["doremi"].zeros)
    text = convert.write("doremi", drawn, {}, {})
    assert json.loads(text)["train_domain_weights"] == {"a": 0.3, "b": 0.7, "c": 0.0}


def test_a_url_has_a_place_for_its_copy() -> None:
    paths = {"a/b": "s3://bucket/a", "c": "file:///d/c"}
    drawn = convert.shares({"a/b": 0.3, "c": 0.7}, None)
    streams = yaml.safe_load(convert.write("mosaicml_streaming", drawn, paths, {}))["streams"]
    assert streams == {
        "a/b": {"remote": "s3://bucket/a", "local": "streams/a%2Fb", "proportion": 0.3},
        "c": {"local": "/d/c", "proportion": 0.7},
    }


@pytest.mark.parametrize("batch_size", [1, 96, 512, 100_000])
def test_a_block_of_levanter_holds_the_smallest_weight(batch_size: int) -> None:
    """As much as a block may: it floors weight · block, and gives the rest to the largest."""
    form = FORMATS["levanter"]
    for least in (0.1, 1e-3, 2.2e-4, 2e-5):
        drawn = convert.shares({"a": 1 - least, "b": least}, None)
        stages = [(0, drawn), (7 * 65535, drawn)]
        text = convert.write("levanter", drawn, {}, {}, stages, batch_size)
        block = yaml.safe_load(text)["data"]["mixture_block_size"]
        assert 2048 <= block < 2**16 and math.floor(least * block) > 0
        assert math.floor(least * block) >= 0.95 * least * block or block > 2**15
        assert form.every is not None
        every = form.every(drawn.values(), batch_size)
        assert every * batch_size % block == 0
        assert all(step * batch_size % block for step in range(1, min(every, 100)))


def test_a_schedule_is_held_between_the_steps_at_which_it_may_change() -> None:
    schedule = [(step, {"a": step / 100, "b": 1 - step / 100}) for step in range(100)]
    held = convert.held(schedule, 100, 30)
    assert [step for step, _ in held] == [0, 30, 60, 90]
    assert [mixed["a"] for _, mixed in held] == pytest.approx([0.145, 0.445, 0.745, 0.945])
    ends = [30, 60, 90, 100]
    mean = sum(mixed["a"] * (end - step) for (step, mixed), end in zip(held, ends, strict=True))
    assert mean / 100 == pytest.approx(0.495)  # the whole run's
    assert convert.held(held, 100, 30) == held
    same = [(0, {"a": 1.0}), (17, {"a": 1.0})]
    assert convert.held(same, 100, 30) == [(0, {"a": 1.0})]


def test_what_a_trainer_cannot_do_is_told() -> None:
    levanter, nanotron = FORMATS["levanter"].tells, FORMATS["nanotron"].tells
    assert levanter is not None and nanotron is not None
    wants, lost = levanter([{"a": 1 - 1e-5, "b": 1e-5}])
    assert "data.components" in wants and "draws nothing of b" in lost
    assert levanter([{"a": 1 - 2e-5, "b": 2e-5, "c": 0.0}]) == [wants]
    # A domain is lost in the stage where its weight is too small.
    assert levanter([{"a": 1 - 1e-5, "b": 1e-5}, {"a": 0.5, "b": 0.5}]) == [wants, lost]
    assert nanotron([{"a": 1.0}]) == []
    assert "a stage at a time" in nanotron([{"a": 1.0}, {"a": 1.0}])[0]
