"""Transformers configs from keys: presets, folders, and what must agree with the tokeniser."""

import difflib
import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from doremi_train.config import STRICT, UserError, conf_dir, judged, read_object

# Options that name a token: in the vocabulary of the tokeniser that a config was made for.
_TOKEN = re.compile("token_(id|index)$|^pad_index$")


STARTED = "started_from"  # in a config: the fingerprint of weights that training began with


@dataclass(frozen=True, config=STRICT)
class ModelOptions:
    """A model is a transformers config, as a mapping with `model_type` or as a local folder or
    config.json."""

    config: dict[str, Any] | None = None
    """Config of any causal language model of transformers, {model_type: llama, …}; null: that of
    path."""

    path: str | None = None
    """Local folder or config.json of such a config; null: see config."""


def preset(name: str, key: str) -> dict[str, Any]:
    """The mapping in `conf/model/NAME.yaml`. Raises UserError listing the presets where there is
    none."""
    import yaml

    folder = conf_dir() / "model"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"{key}={name}: no such model; allowed: {', '.join(names)}")
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def resolve(
    options: ModelOptions, vocabulary: int, end: int, length: int, key: str = "model"
) -> dict[str, Any]:
    """The complete transformers config as plain JSON: what a run is addressed by and built from.

    `vocabulary` is its size and `end` the id that ends a document, both the tokeniser's.

    Raises UserError where the config is unknown, wrong, or too short for sequences of `length`
    tokens.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (options.config is None) == (options.path is None):
        raise UserError(
            f"{key}: give one of {key}.config and {key}.path, or a preset such as {key}=tiny"
        )
    given, values, remedy = _given(options, key)
    # Weights are made anew: they are not quantised, whatever those of the folder are.
    values.pop("quantization_config", None)
    values.pop(STARTED, None)
    kind, values = of_text(values, given, remedy)
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{key}.config.model_type={kind!r}: must be a causal language model of transformers, "
            "such as gpt_neox, llama, gpt2 or qwen3"
        )
    values |= {"vocab_size": vocabulary, "bos_token_id": end, "eos_token_id": end}
    with judged(given, remedy):
        config = AutoConfig.for_model(kind, **values)
        _drop_tokens_beyond(config, vocabulary)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        if "max_position_embeddings" in values or "n_positions" in values:
            raise UserError(
                f"training.sequence_length={length}: {key} has only {positions} positions; "
                f"shorten it or raise {key}.config.max_position_embeddings"
            )
        config.max_position_embeddings = length
    plain = json.loads(config.to_json_string(use_diff=True))
    # The same model under another version is the same model.
    plain.pop("transformers_version", None)
    plain |= {"vocab_size": vocabulary, "model_type": kind}
    with judged(given, remedy):
        _try(json.dumps(plain))
    return plain


@functools.lru_cache(maxsize=64)  # a command asks for its models again and again
def _try(config: str) -> None:
    """Raise what transformers raises where it cannot make this model."""
    skeleton(json.loads(config))


def _given(options: ModelOptions, key: str) -> tuple[str, dict[str, Any], str]:
    """What a user gave, in words; its values; and the remedy where they are wrong."""
    if options.config is None:
        values = read(Path(str(options.path)), f"{key}.path")
        remedy = "mend its config.json, or give another folder"
        return f"{key}.path={options.path}", values, remedy
    _refuse_unknown(options.config, key)
    return (
        f"{key}.config={options.config!s:.200}",
        dict(options.config),
        f"mend {key}.config, or take a preset such as {key}=tiny",
    )


def _refuse_unknown(values: dict[str, Any], key: str) -> None:
    """Refuse what transformers would keep and never look at."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return
    with judged(f"{key}.config.model_type={kind}", "give another"):
        known = AutoConfig.for_model(kind).to_dict()
    for name in values:
        if name not in known | {"model_type": kind}:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"{key}.config.{name}: not an option of {kind} models in transformers{hint}"
            )


def of_text(values: dict[str, Any], given: str, remedy: str) -> tuple[Any, dict[str, Any]]:
    """Kind and values of a config; of a multimodal one, those of its text model."""
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(values)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return kind, values
    with judged(given, remedy):
        whole = AutoConfig.for_model(kind, **values)
        text = whole.get_text_config()
        if text is whole:
            return kind, values
        values = json.loads(text.to_json_string(use_diff=True))
    values.pop("transformers_version", None)
    return values.pop("model_type"), values


def _drop_tokens_beyond(config: Any, vocabulary: int) -> None:
    """Names of tokens that the vocabulary does not have name none."""
    for name, value in config.to_dict().items():
        if _TOKEN.search(name) and isinstance(value, int) and value >= vocabulary:
            setattr(config, name, None)


def read(path: Path, key: str) -> dict[str, Any]:
    """The config of a local folder or config.json. Raises UserError where there is none."""
    file = path / "config.json" if path.is_dir() else path
    return read_object(file, f"{key}={path}", "give a config.json of transformers, or its folder")


def skeleton(config: dict[str, Any], vocabulary: int | None = None) -> Any:
    """The transformers model with shapes alone: its parameters hold no memory. `vocabulary`: in
    place of the config's."""
    with torch.device("meta"):
        return constructed(config, vocabulary)


def constructed(config: dict[str, Any], vocabulary: int | None = None) -> Any:
    """The transformers model with values, drawn from torch's generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    full = AutoConfig.for_model(values.pop("model_type"), **values)
    if vocabulary is not None:
        full.vocab_size = vocabulary
        _drop_tokens_beyond(full, vocabulary)
    return AutoModelForCausalLM.from_config(full)


def parameters(config: dict[str, Any]) -> tuple[int, int]:
    """(all, without embeddings) parameter counts, from shapes alone."""
    inner = skeleton(config)
    total = sum(p.numel() for p in inner.parameters())
    embeddings = {
        id(m.weight): m.weight.numel() for m in inner.modules() if isinstance(m, nn.Embedding)
    }
    return total, total - sum(embeddings.values())
