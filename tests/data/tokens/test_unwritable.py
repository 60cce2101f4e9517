"""Text that a tokeniser cannot write is measured, said and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from doremi_train.config import UserError, load
from doremi_train.data.options import DataOptions
from doremi_train.data.tokens import prepare as preparation
from doremi_train.data.tokens import tokenizer as tokenizers
from doremi_train.data.tokens.shards import TokenStore
from doremi_train.data.tokens.unwritable import Measure, writes_all
from doremi_train.reports import plan_text
from doremi_train.stages.planning import warnings

LEARNED = tokenizers.learn(["some text to learn from, and some more"] * 3, 300)


def with_parts(model: Any, normalizer: Any = None, pre: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    return tokenizer


def letters(text: str) -> dict[str, int]:
    return {letter: number for number, letter in enumerate(text)}


def bytes_without(gone: str) -> Tokenizer:
    """Byte-level BPE, as it is learned from text that lacks the bytes of `gone`."""
    absent = {piece for piece, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str(gone)}
    kept = [b for b in sorted(pre_tokenizers.ByteLevel.alphabet()) if b not in "".join(absent)]
    return with_parts(models.BPE(letters("".join(kept)), []), None, pre_tokenizers.ByteLevel(False))


BERT = normalizers.BertNormalizer()
LOSSY = [
    ("words", with_parts(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"), None,
                         pre_tokenizers.Whitespace()), "a bé a", 3),
    ("pieces", with_parts(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"), BERT,
                          pre_tokenizers.BertPreTokenizer()), "ab  AB\n é", 2),
    ("dropped", with_parts(models.BPE(letters("ab"), [])), "aébx", 3),
    ("merged over what is dropped", with_parts(models.BPE(letters("ab") | {"ab": 2}, [("a", "b")])),
     "aéb", 2),
    ("bytes", bytes_without("é"), "aé e", 2),
    ("unigram", with_parts(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), "aéa", 2),
    ("normaliser", with_parts(LEARNED.model, normalizers.Replace("e", ""),
                              LEARNED.pre_tokenizer), "see", 2),
    ("split", with_parts(LEARNED.model, None, pre_tokenizers.Sequence(
        [pre_tokenizers.CharDelimiterSplit("x"), LEARNED.pre_tokenizer])), "axb", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tokenizer", "text", "lost"), LOSSY, ids=[c[0] for c in LOSSY])
def test_what_a_tokeniser_cannot_write_is_counted_in_bytes(
    name: str, tokenizer: Tokenizer, text: str, lost: int
) -> None:
    assert not writes_all(tokenizer)
    (written,) = Measure(tokenizer).encode([text])
    assert written.lost == lost
    # What is measured is not changed.
    assert written.tokens.tolist() == tokenizers.encode(tokenizer, [text])[0].tolist()


def test_a_tokeniser_that_writes_all_is_known_by_its_parts() -> None:
    fallback = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for tokenizer in (
        LEARNED,
        with_parts(LEARNED.model, normalizers.NFC(), LEARNED.pre_tokenizer),
        with_parts(models.BPE(fallback, [], byte_fallback=True), normalizers.Prepend("▁")),
    ):
        assert writes_all(tokenizer)
        assert [written.lost for written in Measure(tokenizer).encode(["雪 é", ""])] == [0, 0]
    assert not writes_all(with_parts(models.BPE(fallback, [])))


@pytest.fixture
def lossy(tmp_path: Path) -> DataOptions:
    """Two domains: of b, every tenth letter is unknown, and of a none."""
    tokenizer = with_parts(
        models.WordLevel({"[UNK]": 0, "</s>": 1, "a": 2, "1": 3}, "[UNK]"),
        None,
        pre_tokenizers.Split("", "isolated"),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for domain, text in (("a", "a" * 10), ("b", "aaaaaaaaaz")):
        (tmp_path / "in" / domain).mkdir(parents=True)
        for split, count in (("train", 30), ("validation", 31)):
            lines = [json.dumps({"text": text * count})]
            (tmp_path / "in" / domain / f"{split}.jsonl").write_text("\n".join(lines))
    given = {"embedded": None, "root": str(tmp_path / "in")}
    return load(DataOptions, given | {"tokenizer": str(tmp_path / "tokenizer.json")}, "data")


def changed(options: DataOptions, **more: Any) -> DataOptions:
    return load(DataOptions, {**vars(options), **more}, "data")


def test_it_is_measured_for_every_domain_and_refused_above_the_limit(
    lossy: DataOptions, tmp_path: Path
) -> None:
    store = TokenStore.open(preparation.prepare(lossy, tmp_path / "out"))
    assert store.named(store.unwritable()) == {"a": 0, "b": 0.1}
    strict = changed(lossy, max_unwritable=0.05)
    with pytest.raises(UserError, match=r"data.max_unwritable=0.05: .* of domain b \(10.0%\): it"):
        preparation.prepare(strict, tmp_path / "out")
    assert preparation.request(strict) == preparation.request(lossy)
    for free in (changed(strict, only=["a"]), changed(lossy, max_unwritable=None)):
        preparation.prepare(free, tmp_path / "out")


def test_a_store_of_an_earlier_version_was_not_measured(lossy: DataOptions, tmp_path: Path) -> None:
    folder = preparation.prepare(lossy, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    for splits in manifest["domains"].values():
        for split in splits.values():
            del split["unwritable_bytes"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert TokenStore.open(folder).unwritable().tolist() == [0, 0]
    preparation.prepare(changed(lossy, max_unwritable=0), tmp_path / "out")


def test_it_is_warned_of_above_one_per_cent() -> None:
    (message,) = warnings.unwritable({"a": 0.01, "b": 0.034})
    assert message.startswith("The tokeniser cannot write 3.4% of the text of domain b")


def test_the_plan_has_a_column_where_there_is_any() -> None:
    domain = {"training_tokens": 9, "natural_weight": 1.0, "proxy_epochs": None, "final_epochs": {}}
    headings = [
        [
            column.header
            for column in plan_text._domains({"a": domain | {"unwritable": lost}}, None).columns
        ]
        for lost in (0.0, 0.02)
    ]
    assert [name for name in headings[1] if name not in headings[0]] == ["not written"]
