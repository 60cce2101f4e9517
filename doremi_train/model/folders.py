"""A model in a folder: built from a seed, loaded, and saved."""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from doremi_train import files
from doremi_train.config import Refused, UserError, judged, judging
from doremi_train.files import read_json, write_json
from doremi_train.model import birth, configs, weights
from doremi_train.model.configs import skeleton
from doremi_train.model.language_model import (
    LanguageModel,
    Source,
    head_is_plain,
    sees_ahead,
    try_training,
)

REMEDY = "give a folder with a model in safetensors that this version of transformers loads"


def build(
    config: dict[str, Any],
    seed: int,
    activation_checkpointing: bool = False,
    precision: str = "fp32",
    key: str = "model",
) -> LanguageModel:
    """A freshly initialised model, whole: the same parameters for the same config and seed.

    Raises UserError as `shaped` does.
    """
    model = shaped(config, seed, activation_checkpointing, precision, key)
    birth.fill(model, torch.device("cpu"))
    return model


def shaped(
    config: dict[str, Any],
    seed: int,
    activation_checkpointing: bool = False,
    precision: str = "fp32",
    key: str = "model",
) -> LanguageModel:
    """The same as shapes alone, without memory: whoever divides it fills it from its `source`.

    Raises UserError naming `key` where transformers refuses its config, or it sees what it is to
    predict.
    """
    given = f"{key}: its config of model_type={config['model_type']}"
    with judged(given, f"mend {key}.config or the folder in {key}.path"):
        tried = birth.small(config, seed)
        _require_causal(tried, given)
        try_training(tried)
        model = LanguageModel(
            skeleton(config).float(), activation_checkpointing, precision, head_is_plain(tried)
        )
        model.source = birth.Seeded(config, seed)
        return model


def load(folder: Path, vocabulary: int, key: str, precision: str = "fp32") -> LanguageModel:
    """A saved model that only gives losses, of shapes alone or whole as `to_train` gives one. Its
    embedding may have entries beyond the vocabulary, which its losses count: they are what it was
    trained with.

    Raises UserError where it is missing, broken or of another vocabulary.
    """
    model = to_train(folder, key, activation_checkpointing=False, precision=precision)
    entries, own = model.inner.config.vocab_size, _vocabulary(folder, key)
    if entries < vocabulary or own not in (vocabulary, None):
        raise UserError(
            f"{key}={folder}: its vocabulary has {entries if own is None else own} entries, the "
            f"data's tokeniser {vocabulary}; use the tokeniser it was trained with "
            "(data.tokenizer), or train a reference"
        )
    return model


def read(folder: Path, key: str) -> Any:
    """The transformers model of a local folder, whole, from safetensors only, in float32; of a
    multimodal one, its text model. No code in it is run.

    Raises UserError where it is missing or broken, quantised, or sees what it is to predict.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    config, given = _config(folder, key), f"{key}={folder}"
    where = weights.located(folder, given)
    with judged(given, REMEDY):
        text = config.get_text_config()
        one_of = type(config) in AutoModelForCausalLM._model_mapping
        returned: Any = (
            AutoModelForCausalLM if one_of or text is config else AutoModelForMultimodalLM
        ).from_pretrained(
            folder,
            **_HOW,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # it says so without names, and we with them
        )
        inner, loaded = returned
    for name, there, wanted in sorted(loaded["mismatched_keys"], key=str):
        file = where[name].name if name in where else "a file"
        raise UserError(
            f"{given}: {file} has {name} of another shape, {[*there]}, than the model's config "
            f"says, {[*wanted]}; {REMEDY}"
        )
    absent = sorted(loaded["missing_keys"])
    if absent:  # transformers would fill them with random numbers
        raise UserError(
            f"{key}={folder}: its files lack {', '.join(absent[:5])}; give a complete model folder"
        )
    with judged(given, REMEDY):
        inner = inner if text is config else _text_model(inner)
        _require_causal(inner, given)
    return inner


class Opened(NamedTuple):
    """A model in a folder, of which nothing is read yet."""

    inner: Any  # of shapes alone
    source: Source
    plain: bool  # see `language_model.head_is_plain`


def opened(folder: Path, key: str) -> Opened | None:
    """The same as shapes alone, of which whoever divides it reads its own part; None where the
    files have other tensors than the model in memory is made of (a multimodal one): those are read
    whole.

    Raises UserError as `read` does.
    """
    config, given = _config(folder, key), f"{key}={folder}"
    where = weights.located(folder, given)
    if config.get_text_config() is not config:
        return None
    with judged(given, REMEDY):
        values = json.loads(config.to_json_string(use_diff=True))
        values |= {"model_type": config.model_type, "vocab_size": config.vocab_size}
        inner = skeleton(values).float().eval()  # as transformers loads one
        source = weights.stored(inner, where, birth.Seeded(values, 0))
        if source is None:
            return None
        tried = birth.small(values, 0)
        _require_causal(tried, given)
        return Opened(inner, source, head_is_plain(tried))


def to_train(
    folder: Path,
    key: str,
    activation_checkpointing: bool,
    precision: str,
    kind: type[LanguageModel] = LanguageModel,
) -> LanguageModel:
    """A saved model as it is before any step: of shapes alone, for whoever divides it to read its
    own part, or whole where that cannot be.

    Raises UserError as `read` does.
    """
    found = opened(folder, key)
    inner, plain = (found.inner, found.plain) if found else (read(folder, key), None)
    model = kind(inner, activation_checkpointing, precision, plain=plain)
    model.source = found.source if found else None
    return model


_HOW = {"local_files_only": True, "trust_remote_code": False}


def _config(folder: Path, key: str) -> Any:
    """The transformers config of a local folder. Raises UserError where it has none, or weights
    that are not read."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the stages' own
    with judged(f"{key}={folder}", REMEDY, "this machine"):
        there = (folder / "config.json").is_file()  # no name may be too long
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{key}={folder}: its weights are a pickle, which can run code when it is loaded, and "
            "only safetensors are read; load it with transformers where you trust it, and save it "
            "with save_pretrained()"
        )
    given = f"{key}={folder}"
    refuse_adapter(folder, given)
    if not there:
        raise UserError(f"{given}: not a model folder, it has no config.json; {REMEDY}")
    with judged(given, REMEDY):
        config = AutoConfig.from_pretrained(folder, **_HOW)
        quantised = getattr(config, "quantization_config", None)
        if quantised:
            raise UserError(
                f"{given}: its weights are quantised ({quantised!s:.100}), and only plain ones "
                "are trained and compared; dequantise it with transformers, and save it with "
                "save_pretrained()"
            )
    return config


def refuse_adapter(folder: Path, given: str) -> None:
    """Raises UserError where a folder has an adapter, also beside its base: transformers would put
    the two together, and what reads tensors by name the base alone."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{given}: holds an adapter (LoRA, …) of another model, and whole models are read; "
            "merge it into its base with PeftModel.merge_and_unload(), and save that with "
            "save_pretrained()"
        )


def _text_model(whole: Any) -> Any:
    """The text model of a multimodal one, with its weights."""
    from transformers import AutoModelForCausalLM

    inner = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=torch.float32)
    inner.base_model.load_state_dict(whole.get_decoder().state_dict())
    inner.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict())
    inner.tie_weights()
    return inner.eval()  # as transformers loads one


def _vocabulary(folder: Path, key: str) -> int | None:
    """Largest token id + 1 of the tokeniser beside a model; None where there is none."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    with judged(f"{key}={folder}", "mend its tokenizer.json", "the tokenizers library"):
        return max(Tokenizer.from_file(str(file)).get_vocab().values()) + 1


def _require_causal(inner: Any, given: str) -> None:
    if sees_ahead(inner):
        raise UserError(
            f"{given}: this model sees the tokens that it is to predict, so its losses say nothing "
            "(a change of a token moved the losses before it); take a causal model, or set "
            "is_decoder: true where its kind has that (bert, roberta, electra, …)"
        )


def save(
    model: LanguageModel,
    tensors: Mapping[str, Tensor],
    folder: Path,
    tokenizer: Tokenizer,
    end: int,
    length: int | None = None,
    sample: Sequence[str] = (),
) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load; `end` is the id that ends a
    document, `length` the tokens that the model was trained to read, where they are known.

    `tensors` are the model's, whole and by name. Raises UserError as `complete` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = weights.planned(model)
    parts = [
        weights.write(model, {name: tensors[name] for name in names}, folder, number, len(plan))
        for number, names in enumerate(plan, 1)
    ]
    complete(model, parts, folder, tokenizer, end, length, sample)


def complete(
    model: LanguageModel,
    parts: Sequence[Mapping[str, Any]],
    folder: Path,
    tokenizer: Tokenizer,
    end: int,
    length: int | None = None,
    sample: Sequence[str] = (),
) -> None:
    """All that `save` writes beside the weights, of which `parts` is what `weights.write` returned.

    Raises UserError where AutoTokenizer gives other ids than `tokenizer`, tried on the texts of
    `sample`.
    """
    describe(model, parts, folder)
    if length is not None and configs.STARTED not in model.inner.config.to_dict():
        _state_positions(model, folder / "config.json", length)
    _save_tokenizer(tokenizer, end, folder, length)
    files.follow_umask(folder)
    kind = str(model.inner.config.model_type)
    _refuse_other_ids(folder, tokenizer, end, (*_probes(tokenizer), *sample), "model", kind)


def describe(model: LanguageModel, parts: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The model's config, and where its tensors are."""
    weights.write_index(folder, parts)
    inner, config = model.inner, model.inner.config
    config.dtype = "float32"
    config.architectures = [type(inner).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    if inner.can_generate():
        inner.generation_config.save_pretrained(folder)


def require_same_tokenizer(
    config: Mapping[str, Any], tokenizer: Tokenizer, end: int, key: str
) -> None:
    """Raises UserError where transformers would open another tokeniser than `tokenizer` in the
    folder of a model of this config, given as `key`: it has a class of its own for some models."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "config.json", dict(config))
        _save_tokenizer(tokenizer, end, folder, None)
        kind = str(config["model_type"])
        _refuse_other_ids(folder, tokenizer, end, _probes(tokenizer), key, kind)


# Letters, marks, digits, contractions and white space: where tokenisers part words differently.
_PROBE = (
    "It's 1234567 o'Clock,  naïve cafe\u0301 ﬁn\n\n\tdef f(x):\r\n    x_1**2 == '中文 नमस्ते' 🙂 "
)


def _probes(tokenizer: Tokenizer, most: int = 1000) -> tuple[str, ...]:
    """Texts that tell two tokenisers apart, also where one of them knows few words."""
    words = sorted(tokenizer.get_vocab(with_added_tokens=False).values())
    known = words[:: max(len(words) // most, 1)]
    return (_PROBE, tokenizer.decode(known), " ".join(tokenizer.decode([word]) for word in known))


def _save_tokenizer(tokenizer: Tokenizer, end: int, folder: Path, length: int | None) -> None:
    from transformers import PreTrainedTokenizerFast

    token = tokenizer.id_to_token(end)
    more = {} if length is None else {"model_max_length": length}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=token, eos_token=token, **more
    ).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    # The name that transformers 4 knows as well; 5 writes its own.
    write_json(file, read_json(file) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _refuse_other_ids(
    folder: Path, tokenizer: Tokenizer, end: int, texts: Iterable[str], key: str, kind: str
) -> None:
    from transformers import AutoTokenizer

    remedy = (
        f"transformers has a tokeniser of its own for {kind} models; take another {key}.config."
        "model_type, such as llama, gpt_neox or qwen3, or the tokeniser of these models "
        "(data.tokenizer)"
    )
    try:
        with judging():
            opened: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            same = opened.get_vocab() == tokenizer.get_vocab(with_added_tokens=True) and all(
                _ids(opened, text) == ids
                for text in texts
                if (ids := _encoded(tokenizer, text)) is not None
            )
    except Refused as error:
        raise UserError(
            f"{key}.config.model_type={kind}: AutoTokenizer cannot open the data's tokeniser in "
            f"the folder of such a model ({error}); {remedy}"
        ) from None
    if not same or opened.eos_token_id != end:
        raise UserError(
            f"{key}.config.model_type={kind}: in the folder of such a model AutoTokenizer opens "
            f"{type(opened).__name__}, which gives other ids than the data's tokeniser; {remedy}"
        )


def _encoded(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Ids of a text; None where the tokeniser cannot write it."""
    try:
        with judging():
            return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except Refused:
        return None


def _ids(opened: Any, text: str) -> list[int]:
    ids: list[int] = opened(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    return ids


def _state_positions(model: LanguageModel, file: Path, length: int) -> None:
    """Write into a saved config how many positions the model was trained for, where they are no
    shape of its tensors and nothing is scaled by them."""
    values = model.inner.config.to_dict()
    if "max_position_embeddings" not in values or _scaled(values):
        return
    changed = values | {"max_position_embeddings": length}
    shapes = {name: value.shape for name, value in skeleton(changed).named_parameters()}
    if shapes == {name: value.shape for name, value in skeleton(values).named_parameters()}:
        stated = {"max_position_embeddings": length, _BUILT: values["max_position_embeddings"]}
        files.write_bytes(file, _config_text(read_json(file) | stated))


# Positions that a model was built with, in the config of one that was trained for others.
_BUILT = "built_max_position_embeddings"


def _config_text(values: Mapping[str, Any]) -> bytes:
    """A config.json as transformers lays it out."""
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _scaled(values: Any) -> bool:
    """Whether rotary positions are scaled by what the config says of positions."""
    if not isinstance(values, dict):
        return False
    kind = values.get("rope_type", values.get("type"))
    return kind not in (None, "default") or any(
        _scaled(value)
        for name, value in values.items()
        if name.startswith("rope") or "attention" in name
    )


def folder_fingerprint(folder: Path) -> str:
    """Content address of a saved model's weights and config, which is as the model was built: what
    it states of its training changes no loss.

    Raises UserError where the folder cannot be read.
    """
    try:
        with judging():
            return _fingerprint(folder)
    except Refused as refused:
        raise UserError(f"{folder}: not a model folder ({refused}); {REMEDY}") from None


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(path.name.encode())
        if path.name == "config.json" and _BUILT in (values := read_json(path)):
            values["max_position_embeddings"] = values.pop(_BUILT)
            digest.update(_config_text(values))
            continue
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
