"""Models: losses against a naive oracle, the paper's sizes, folders that transformers loads.

B sequences, T tokens, V vocabulary.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import models
from torch import Tensor

from doremi_train.config import UserError, judged
from doremi_train.data.tokens import tokenizer
from doremi_train.model import configs, folders, language_model
from doremi_train.model import language_model as lm
from doremi_train.model.configs import ModelOptions
from doremi_train.model.language_model import LanguageModel

TINY: dict[str, Any] = {
    "model_type": "gpt_neox", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16,
    "intermediate_size": 32, "tie_word_embeddings": True,
}  # fmt: skip
SMALL: dict[str, Any] = {
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16,
    "intermediate_size": 32, "head_dim": 8,
}  # fmt: skip
TOKENS = torch.randint(300, (3, 11), generator=torch.Generator().manual_seed(0))


def build(config: dict[str, Any] = TINY, vocabulary: int = 300, **options: Any) -> LanguageModel:
    return folders.build(
        configs.resolve(ModelOptions(config=config), vocabulary, 0, 16), 0, **options
    )


def fuse(monkeypatch: pytest.MonkeyPatch, logits: int = 900) -> None:
    """From now on no more than so many logits exist at once."""
    monkeypatch.setattr(language_model, "_LOGITS_ON_CPU", logits)


def oracle(language_model: LanguageModel, tokens: Tensor) -> Tensor:
    """(B, T) by log_softmax over logits in float64."""
    logits = language_model.inner(input_ids=tokens[:, :-1]).logits.double()
    return -torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]


def gradients(language_model: LanguageModel, losses: Tensor) -> list[Tensor]:
    weights = torch.linspace(0, 1, losses.numel(), dtype=losses.dtype).view_as(losses)
    return list(torch.autograd.grad((weights * losses).sum(), list(language_model.parameters())))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "chunk", [1, 7 * 300, 29 * 300]
)  # logits: one token, seven tokens, all but the last
def test_fused_loss_equals_the_naive_one_in_value_and_gradient(
    chunk: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(monkeypatch, chunk)
    language_model = build(activation_checkpointing=checkpointing).double().train()
    losses, expected = language_model(TOKENS), oracle(language_model, TOKENS)
    assert (
        language_model.projection is not None
        and losses.shape == (3, 10)
        and losses.dtype == torch.float32
    )
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-6)
    for found, right in zip(
        gradients(language_model, losses), gradients(language_model, expected), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)


def test_fused_and_plain_losses_are_the_same_under_autocast_and_not_rounded_to_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    language_model = build()
    monkeypatch.setattr(lm, "NARROW_ON_CPU", 0)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = language_model(TOKENS)
        fuse(monkeypatch)
        fused = language_model(TOKENS)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-6)
    assert plain.dtype == torch.float32 and not torch.equal(plain, plain.bfloat16().float())
    torch.testing.assert_close(plain.double(), oracle(language_model, TOKENS), rtol=0, atol=0.02)


def test_the_first_loss_is_that_of_guessing() -> None:
    assert build()(TOKENS).mean().item() == pytest.approx(5.7, abs=0.2)  # ln 300


def test_a_loss_does_not_see_the_future_or_the_other_sequences() -> None:
    language_model = build().eval()
    changed = TOKENS.clone()
    changed[0, 6:] += 1
    with torch.no_grad():
        before, after = language_model(TOKENS), language_model(changed % 300)
    torch.testing.assert_close(before[0, :5], after[0, :5])
    torch.testing.assert_close(before[1:], after[1:])
    assert not torch.allclose(before[0, 5:], after[0, 5:])


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        ({"model_type": "llama", **SMALL}, True),
        ({"model_type": "qwen3", **SMALL}, True),
        ({"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16}, True),
        (
            {
                "model_type": "cohere",
                **{k: v for k, v in SMALL.items() if k != "head_dim"},
                "logit_scale": 0.5,
            },
            False,
        ),
        ({"model_type": "gemma2", **SMALL, "final_logit_softcapping": 2.0}, False),
        (
            {
                "model_type": "granite",
                **{k: v for k, v in SMALL.items() if k != "head_dim"},
                "logits_scaling": 4.0,
            },
            False,
        ),
    ],
)
def test_a_head_that_caps_or_scales_its_logits_is_never_fused(
    config: dict[str, Any], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(monkeypatch)
    language_model = build(config).eval()
    assert (language_model.projection is not None) == plain
    with torch.no_grad():
        losses = language_model(TOKENS).double()
        torch.testing.assert_close(losses, oracle(language_model, TOKENS), rtol=0, atol=1e-5)


def test_building_leaves_the_model_in_training_mode_or_not_as_it_was() -> None:
    assert LanguageModel(build().inner.eval()).inner.training is False
    assert LanguageModel(build().inner.train()).inner.training is True


# Presets and configs

SIZES = {  # layers, heads, head size, d_model, d_ff of the paper
    "70m": (3, 4, 64, 256, 1024),
    "150m": (6, 8, 64, 512, 2048),
    "280m": (12, 12, 64, 768, 3072),
    "510m": (12, 16, 64, 1024, 8192),
    "760m": (12, 20, 64, 1280, 8192),
    "1b": (16, 32, 64, 2048, 8192),
    "8b": (32, 32, 128, 4096, 24576),
}


@pytest.mark.parametrize("vocabulary", [1024, 256_000])
@pytest.mark.parametrize("name", sorted(SIZES))
def test_presets_have_the_shapes_of_the_paper_with_any_vocabulary(
    name: str, vocabulary: int
) -> None:
    layers, heads, head, width, inner = SIZES[name]
    config = configs.resolve(ModelOptions(**configs.preset(name, "model")), vocabulary, 0, 4096)
    total, body = configs.parameters(config)
    assert heads * head == width
    assert config["num_attention_heads"] == heads and config["vocab_size"] == vocabulary
    # Attention 4 d² + 4 d, feed-forward 2 d f + f + d, two norms of 2 d; then the last norm.
    # Embeddings are tied.
    assert (
        body
        == layers * (4 * width**2 + 4 * width + 2 * width * inner + inner + width + 4 * width)
        + 2 * width
    )
    assert total == body + vocabulary * width


def test_an_unknown_preset_is_told_the_known_ones() -> None:
    with pytest.raises(UserError, match="model=2b: no such model; allowed: .*280m.*tiny"):
        configs.preset("2b", "model")


@pytest.mark.parametrize(
    ("options", "length", "named"),
    [
        (ModelOptions(), 16, "give one of"),
        (ModelOptions(config=TINY, path="x"), 16, "give one of"),
        (
            ModelOptions(config={**TINY, "model_type": "gpt_noex"}),
            16,
            "model.config.model_type='gpt_noex'",
        ),
        (ModelOptions(config={"num_hidden_layers": 1}), 16, "model.config.model_type=None"),
        (
            ModelOptions(config={**TINY, "num_layers_hidden": 3}),
            16,
            "model.config.num_layers_hidden",
        ),
        (
            ModelOptions(config={**TINY, "max_position_embeddings": 8}),
            16,
            "training.sequence_length=16",
        ),
        (ModelOptions(path="/nowhere/at/all"), 16, "model.path=/nowhere/at/all"),
    ],
)
def test_a_wrong_config_is_refused_by_name(options: ModelOptions, length: int, named: str) -> None:
    with pytest.raises(UserError) as error:
        configs.resolve(options, 300, 0, length)
    assert named in str(error.value)


LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"hidden_size": 15}, "not a multiple"),  # a validator of the whole
        ({"hidden_size": "16"}, "expected int, got str"),  # of a field
        ({"hidden_act": "gelu_fast2"}, "KeyError: 'gelu_fast2'"),
        ({"pad_token_id": -400}, "Padding_idx must be within"),  # an assertion
        ({"model_type": "gpt2", "n_embd": 15, "n_head": 2}, "must be divisible"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "must match the size"),  # a forward
    ],
)
def test_what_transformers_refuses_in_any_of_its_ways_is_a_mistake(
    changes: dict[str, Any], cause: str
) -> None:
    given = changes if "model_type" in changes else LLAMA | changes
    with pytest.raises(UserError) as error:
        folders.build(configs.resolve(ModelOptions(config=given), 300, 0, 16), 0)
    said = str(error.value)
    assert cause in said and "model" in said and "mend model.config" in said


def test_the_guard_passes_on_mistakes_that_are_named_and_memory_that_is_out() -> None:
    for error in (UserError("named"), MemoryError(), torch.OutOfMemoryError()):
        with pytest.raises(type(error)), judged("key=value", "mend it"):
            raise error
    said = pytest.raises(UserError, match=r"^key=value: it refuses it: IndexError; mend it$")
    with said, judged("key=value", "mend it", "it"):
        raise IndexError


@pytest.mark.parametrize("kind", ["phi3", "olmo2", "gpt_oss"])  # whose padding is far beyond
def test_tokens_beyond_the_vocabulary_are_dropped_from_a_config(kind: str, tmp_path: Path) -> None:
    shape = {key: value for key, value in SMALL.items() if key != "head_dim" or kind == "gpt_oss"}
    given = {**shape, "model_type": kind, "pad_token_id": 100277}
    (tmp_path / "config.json").write_text(json.dumps(given))
    config = configs.resolve(ModelOptions(path=str(tmp_path)), 300, 7, 16)
    assert config["pad_token_id"] is None and config["eos_token_id"] == 7
    assert folders.build(config, 0)(TOKENS).isfinite().all()


def multimodal() -> Any:
    from transformers import AutoConfig

    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = {**SMALL, "vocab_size": 320, "max_position_embeddings": 64}
    return AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4
    )


def test_a_multimodal_config_gives_its_text_model(tmp_path: Path) -> None:
    multimodal().save_pretrained(tmp_path)
    config = configs.resolve(ModelOptions(path=str(tmp_path)), 300, 0, 16)
    assert (config["model_type"], config["vocab_size"]) == ("gemma3_text", 300)
    model = folders.build(config, 0)
    assert model.inner.get_input_embeddings().weight.shape == (300, 16)
    assert not any("vision" in name for name, _ in model.named_parameters())


def test_a_multimodal_folder_gives_its_text_model_with_its_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(multimodal()).eval()
    whole.save_pretrained(tmp_path / "whole")
    text = folders.read(tmp_path / "whole", "finetune.model")
    with torch.no_grad():
        assert torch.equal(text(TOKENS).logits, whole(input_ids=TOKENS).logits)
    assert text.get_output_embeddings().weight is text.get_input_embeddings().weight
    text.save_pretrained(tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert again.config.model_type == "gemma3_text" and torch.equal(
        again(TOKENS).logits, text(TOKENS).logits
    )


ENCODERS = {
    "bert": SMALL, "roberta": SMALL, "electra": SMALL, "roformer": SMALL,
    "cpmant": {"hidden_size": 16, "dim_ff": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_model_that_sees_what_it_is_to_predict_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**ENCODERS[kind], "model_type": kind}))
    config = configs.resolve(ModelOptions(path=str(tmp_path)), 300, 0, 16)
    with pytest.raises(UserError, match=f"model_type={kind}: this model sees the tokens"):
        folders.build(config, 0)
    if kind == "bert":
        told = configs.resolve(
            ModelOptions(config={"model_type": kind, "is_decoder": True, "hidden_size": 24}),
            300, 0, 16,
        )  # fmt: skip
        folders.build(told, 0)


@pytest.mark.parametrize("kind", ["jamba", "recurrent_gemma", "qwen3_5_text"])
def test_layers_without_attention_are_probed_too_and_nothing_is_changed(kind: str) -> None:
    """Their cache is none."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind).to_dict()
    shape = {key: value for key, value in SMALL.items() if key in known and key != "head_dim"}
    inner = folders.build(
        configs.resolve(ModelOptions(config={**shape, "model_type": kind}), 300, 0, 16), 0
    ).inner.train()
    inner.config.use_cache = True
    assert not language_model.sees_ahead(inner)
    assert inner.config.use_cache is True and inner.training


def test_rounding_is_not_taken_for_sight() -> None:
    """Experts that are computed together give other last bits when others come."""
    shape = {
        "model_type": "mixtral", "hidden_size": 256, "num_hidden_layers": 3,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    folders.build(configs.resolve(ModelOptions(config=shape), 300, 0, 16), 0)


def test_positions_grow_with_the_sequence_where_nobody_chose_them() -> None:
    assert (
        configs.resolve(ModelOptions(config=TINY), 300, 0, 9000)["max_position_embeddings"] == 9000
    )


def test_a_config_from_a_folder_or_a_file_is_the_mapping(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    expected = configs.resolve(ModelOptions(config=TINY), 300, 0, 16)
    for path in (tmp_path, tmp_path / "config.json"):
        assert configs.resolve(ModelOptions(path=str(path)), 300, 0, 16) == expected


def test_a_resolved_config_is_plain_and_has_the_tokeniser_s_vocabulary_and_end() -> None:
    config = configs.resolve(ModelOptions(config=TINY), 321, 7, 16)
    assert json.loads(json.dumps(config)) == config
    assert config["vocab_size"] == 321 and config["model_type"] == "gpt_neox"
    inner = folders.build(config, 0).inner
    assert (inner.config.eos_token_id, inner.get_output_embeddings().weight.shape) == (7, (321, 16))


def test_the_same_seed_gives_the_same_parameters() -> None:
    config = configs.resolve(ModelOptions(config=TINY), 300, 0, 16)
    states = [folders.build(config, seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert all(
        value.dtype == torch.float32 for value in states[0].values() if value.is_floating_point()
    )


def test_embeddings_are_tied_where_the_config_says_so() -> None:
    for tied in (True, False):
        inner = build({**TINY, "tie_word_embeddings": tied}).inner
        assert (inner.get_output_embeddings().weight is inner.get_input_embeddings().weight) == tied


# Folders

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
TOKENIZER = tokenizer.learn(["some text for a small tokeniser"], 300)


def saved(folder: Path, padding: int = 0, **changes: Any) -> LanguageModel:
    entries = TOKENIZER.get_vocab_size() + padding
    language_model = build({**TINY, **changes}, vocabulary=entries).eval()
    folders.save(language_model, dict(language_model.named_parameters()), folder, TOKENIZER, 0)
    return language_model


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_by_transformers_and_gives_the_same_losses(
    tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    language_model = saved(tmp_path, tie_word_embeddings=tied)
    tokens = TOKENS % TOKENIZER.get_vocab_size()
    theirs = LanguageModel(AutoModelForCausalLM.from_pretrained(tmp_path)).eval()
    ours = models.loaded(tmp_path, TOKENIZER.get_vocab_size())
    with torch.no_grad():
        assert torch.equal(theirs(tokens), language_model(tokens))
        assert torch.equal(ours(tokens), language_model(tokens))
    text = "some text"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == TOKENIZER.encode(text).ids
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 0


def test_a_saved_tokeniser_says_what_transformers_4_knows_and_how_much_the_model_reads(
    tmp_path: Path,
) -> None:
    for kind, positions in (("gpt_neox", 48), ("gpt2", None)):
        folder = tmp_path / kind
        size = TOKENIZER.get_vocab_size()
        options = ModelOptions(config=TINY if kind == "gpt_neox" else GPT2)
        language_model = folders.build(configs.resolve(options, size, 0, 48), 0).eval()
        before = os.umask(0o027)
        try:
            tensors = dict(language_model.named_parameters())
            folders.save(language_model, tensors, folder, TOKENIZER, 0, 48, ["more of the text"])
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}
        said = json.loads((folder / "tokenizer_config.json").read_text())
        assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert said["model_max_length"] == 48
        config = json.loads((folder / "config.json").read_text())
        assert config.get("max_position_embeddings") == positions
        assert config.get("n_positions") == (64 if kind == "gpt2" else None)
        theirs = models.loaded(folder, size)
        assert torch.equal(theirs(TOKENS % size), language_model(TOKENS % size))


def test_the_fingerprint_of_a_folder_is_not_of_what_it_says_of_the_training(tmp_path: Path) -> None:
    language_model = saved(tmp_path / "a")
    tensors = dict(language_model.named_parameters())
    folders.save(language_model, tensors, tmp_path / "b", TOKENIZER, 0, 48)
    configs_of = [(tmp_path / name / "config.json").read_bytes() for name in "ab"]
    assert configs_of[0] != configs_of[1]
    assert folders.folder_fingerprint(tmp_path / "a") == folders.folder_fingerprint(tmp_path / "b")


def test_positions_that_rotary_scaling_needs_are_left() -> None:
    assert not folders._scaled({"rope_parameters": {"rope_type": "default"}})
    assert folders._scaled({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}})
    assert folders._scaled({"rope_scaling": {"type": "linear"}})


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_a_model_whose_folder_opens_with_another_tokeniser_is_refused(kind: str) -> None:
    size = TOKENIZER.get_vocab_size()
    options = ModelOptions(config={"model_type": kind, "num_hidden_layers": 1})
    config = configs.resolve(options, size, 0, 48)
    if kind == "qwen2":
        with pytest.raises(UserError, match=r"model.config.model_type=qwen2: .*Qwen2Tokenizer, wh"):
            folders.require_same_tokenizer(config, TOKENIZER, 0, "model")
    else:
        folders.require_same_tokenizer(config, TOKENIZER, 0, "model")


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(
        UserError, match=r"reference\.path=.*vocabulary has \d+ entries, the data's tokeniser 999"
    ):
        folders.load(tmp_path, 999, "reference.path")


def test_an_embedding_padded_beyond_its_tokeniser_is_read_and_its_losses_are_as_they_are(
    tmp_path: Path,
) -> None:
    model, own = saved(tmp_path, padding=64), TOKENIZER.get_vocab_size()
    loaded = models.loaded(tmp_path, own)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS % own), oracle(model, TOKENS % own).float())
    with pytest.raises(UserError, match=f"has {own} entries.*tokeniser {own + 64}"):
        folders.load(
            tmp_path, own + 64, "reference.path"
        )  # which the embedding has, but as padding


def test_a_quantised_folder_is_refused_and_gives_a_config_all_the_same(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "config.json"
    how = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    with pytest.raises(UserError, match=r"finetune\.model=.*quantised.*dequantise"):
        folders.read(tmp_path, "finetune.model")
    config = configs.resolve(ModelOptions(path=str(tmp_path)), 300, 0, 16)
    assert "quantization_config" not in config


def test_a_missing_or_broken_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reference\.path="):
        folders.load(tmp_path / "nothing", 300, "reference.path")
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=r"reference\.path="):
        folders.load(tmp_path, TOKENIZER.get_vocab_size(), "reference.path")


def test_the_fingerprint_of_a_folder_changes_with_its_weights(tmp_path: Path) -> None:
    language_model = saved(tmp_path / "a")
    saved(tmp_path / "b")
    assert folders.folder_fingerprint(tmp_path / "a") == folders.folder_fingerprint(tmp_path / "b")
    with torch.no_grad():
        next(language_model.parameters()).add_(1e-3)
    folders.save(
        language_model, dict(language_model.named_parameters()), tmp_path / "b", TOKENIZER, 0
    )
    assert folders.folder_fingerprint(tmp_path / "a") != folders.folder_fingerprint(tmp_path / "b")


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    """transformers would fill the gap with random numbers, and the excess loss would be measured
    against noise."""
    from safetensors.torch import load_file, save_file

    inner = build().inner
    inner.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in sorted(tensors) if "dense" in name or "mlp" in name)
    save_file(
        {n: t for n, t in tensors.items() if n != gone},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="lack"):
        folders.load(tmp_path, inner.config.vocab_size, "reference.path")
