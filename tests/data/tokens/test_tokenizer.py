"""Tokenisers: learned ones are deterministic and lossless, loaded ones are used as the data needs
them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doremi_train.config import Refused, UserError, judging
from doremi_train.data.tokens import tokenizer as tokenizers

TEXTS = [
    f"The {a} house of number {i}, said the {b}.\n"
    for i in range(40)
    for a in ("red", "blue")
    for b in ("cat", "ox")
]
LEARN = """
from doremi_train.data.tokens import tokenizer
pairs = [(a, b) for a in "xyzuvw" for b in ("foo", "bar", "qux")]
texts = [f"the {a} and {b} of {a}{b} {i * i}" for i in range(300) for a, b in pairs]
print(tokenizer.fingerprint(tokenizer.learn(texts, 400)))
"""


@pytest.fixture(scope="module")
def learned() -> tokenizers.Tokenizer:
    return tokenizers.learn(TEXTS, 300)


def save(tokenizer: tokenizers.Tokenizer, path: Path) -> str:
    path.write_text(tokenizers.serialise(tokenizer), encoding="utf-8")
    return str(path)


def test_end_of_document_is_id_0_of_a_learned_tokeniser(learned: tokenizers.Tokenizer) -> None:
    assert tokenizers.end_of_document(learned) == learned.token_to_id("<|endoftext|>") == 0
    assert tokenizers.vocabulary_size(learned) == 300


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    tokenizer = tokenizers.learn(TEXTS[:3], 270)
    ids = tokenizers.encode(tokenizer, [text])[0]
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_the_end_of_document_written_in_a_text_is_text(learned: tokenizers.Tokenizer) -> None:
    ids = tokenizers.encode(learned, ["a<|endoftext|>b"])[0]
    assert 0 not in ids
    assert learned.decode(ids.tolist()) == "a<|endoftext|>b"


def test_learning_depends_on_neither_hash_seed_nor_threads() -> None:
    found = set()
    for seed, threads, parallel in (("1", "1", "true"), ("2", "4", "true"), ("3", "1", "false")):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": parallel,
            "PYTHONPATH": str(Path(__file__).parents[3]),
        }
        run = subprocess.run(
            [sys.executable, "-c", LEARN],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(run.stdout.strip())
    assert len(found) == 1


def test_loading_gives_the_same_tokeniser_from_file_and_folder(
    learned: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    file = save(learned, tmp_path / "tokenizer.json")
    for name in (file, str(tmp_path)):
        assert tokenizers.fingerprint(tokenizers.load(name)) == tokenizers.fingerprint(learned)


def test_truncation_padding_and_dropout_of_a_file_are_off(
    learned: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    changed = tokenizers.parse(tokenizers.serialise(learned))
    changed.enable_truncation(3)
    changed.enable_padding(length=50)
    changed.model.dropout = 0.5
    loaded = tokenizers.load(save(changed, tmp_path / "tokenizer.json"))
    assert tokenizers.fingerprint(loaded) == tokenizers.fingerprint(learned)
    for text, ids in zip(TEXTS, tokenizers.encode(loaded, TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizers.encode(learned, [text])[0])


def test_fingerprint_is_of_the_content(learned: tokenizers.Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(tokenizers.serialise(learned)), indent=7, sort_keys=True))
    assert tokenizers.fingerprint(tokenizers.load(str(file))) == tokenizers.fingerprint(learned)
    assert tokenizers.fingerprint(tokenizers.learn(TEXTS[:80], 290)) != tokenizers.fingerprint(
        learned
    )


def test_a_folder_with_slow_files_only_is_converted(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = tokenizers.load(str(tmp_path))
    assert tokenizers.encode(tokenizer, ["the cats"])[0].tolist() == [5, 6, 7]
    assert tokenizers.end_of_document(tokenizer) == 3  # [SEP]


def test_end_of_document_by_name_and_its_errors(learned: tokenizers.Tokenizer) -> None:
    a = learned.token_to_id("a")
    assert tokenizers.end_of_document(learned, "a") == a
    with pytest.raises(
        UserError, match=r"data.end_of_document='</s>': not a token.*<\|endoftext\|>"
    ):
        tokenizers.end_of_document(learned, "</s>")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(UserError, match=r"data.end_of_document=None: not given"):
        tokenizers.end_of_document(plain)


def test_vocabulary_size_covers_gaps() -> None:
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "</s>": 70_000}, unk_token="a")
    )
    assert tokenizers.vocabulary_size(plain) == 70_001


def test_what_is_no_tokeniser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.tokenizer='gpt2': no such file or folder"):
        tokenizers.load("gpt2")  # a hub name: never downloaded
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data.tokenizer=.*neither"):
        tokenizers.load(str(tmp_path / "empty"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"data.tokenizer=.*not a readable tokenizer.json"):
        tokenizers.load(str(tmp_path))


def gemma_like(folder: Path, **config: object) -> str:
    """A folder whose tokeniser has </s> as an HTML tag, that is not special."""
    tokenizer = tokenizers.parse(tokenizers.serialise(tokenizers.learn(TEXTS, 300)))
    tokenizer.add_tokens(["</s>"])
    tokenizer.add_special_tokens(["<eos>", "<stop>"])
    content = json.loads(tokenizers.serialise(tokenizer))
    for entry in content["added_tokens"]:
        entry["special"] &= entry["id"] != 0
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_documents_end_with_what_the_folder_says_and_else_with_a_special_token(
    tmp_path: Path,
) -> None:
    def end(name: str, key: str | None = None) -> str | None:
        loaded = tokenizers.load(name)
        return loaded.id_to_token(
            tokenizers.end_of_document(loaded, key, tokenizers.said_end(name))
        )

    silent = gemma_like(tmp_path / "silent")
    assert end(silent) == "<eos>"
    said = gemma_like(tmp_path / "said", eos_token="<stop>")
    assert end(said) == end(f"{said}/tokenizer.json") == "<stop>"
    assert end(said, "</s>") == "</s>"
    assert end(gemma_like(tmp_path / "entry", eos_token={"content": "<stop>"})) == "<stop>"
    (tmp_path / "silent" / "special_tokens_map.json").write_text('{"eos_token": "<stop>"}')
    assert end(silent) == "<stop>"
    with pytest.raises(UserError, match=r"data.end_of_document=None: .*'<gone>', which is not"):
        end(gemma_like(tmp_path / "gone", eos_token="<gone>"))
    (tmp_path / "said" / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer_config.json: must hold a JSON object"):
        end(said)


def test_a_text_that_the_library_raises_an_error_on_is_named() -> None:
    words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]")
    with pytest.raises(
        UserError, match=r"data.tokenizer cannot encode 'new' \(.*\[UNK\]"
    ) as raised:
        tokenizers.encode(tokenizers.Tokenizer(words), ["a", "new", "b"])
    assert isinstance(raised.value, tokenizers.CannotEncode) and raised.value.number == 1


def test_a_panic_of_the_library_is_a_refusal() -> None:
    class Panic(BaseException):
        pass

    with pytest.raises(Refused, match="^first second$"), judging():
        raise Panic("first\nsecond")
    with pytest.raises(KeyboardInterrupt), judging():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("package", "content"), [("sentencepiece", b"\n\x0e\n\x05<unk>\x15"), ("tiktoken", b"IQ== 0\n")]
)
def test_the_package_that_a_model_file_needs_is_named(
    package: str, content: bytes, tmp_path: Path
) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(UserError, match=rf"tokenizer.model needs the package {package}: pip"):
        tokenizers.load(str(tmp_path))


def learned_from_whole_words(texts: list[str], size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_long_words_are_cut_and_ordinary_text_is_learned_as_it_was() -> None:
    longest = tokenizers.LONGEST_WORD
    ordinary = [*TEXTS, "雪" * (longest // 3), "=" * longest, "\n" * longest]
    assert tokenizers.serialise(tokenizers.learn(ordinary, 400)) == tokenizers.serialise(
        learned_from_whole_words(ordinary, 400)
    )
    # "ab" is frequent, where no word is cut between its letters.
    cut = ["x" + "ab" * longest]
    parts = [("x" + "ab" * longest)[i : i + longest] for i in range(0, 2 * longest + 1, longest)]
    assert tokenizers.serialise(tokenizers.learn(cut, 300)) == tokenizers.serialise(
        learned_from_whole_words(parts, 300)
    )
    assert tokenizers.serialise(tokenizers.learn(cut, 300)) != tokenizers.serialise(
        learned_from_whole_words(cut, 300)
    )
