"""A model in a folder: built from a seed, loaded, and saved."""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from doremi_train.config import UserError, judged
from doremi_train.model.language_model import LanguageModel, sees_ahead

REMEDY = "give a folder with a model in safetensors that this version of transformers loads"


def build(
    config: dict[str, Any],
    seed: int,
    activation_checkpointing: bool = False,
    precision: str = "fp32",
    key: str = "model",
) -> LanguageModel:
    """A freshly initialised model: the same parameters for the same config and seed.

    Raises UserError naming `key` where transformers refuses its config, or it sees what it is to
    predict.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    torch.manual_seed(seed)
    given = f"{key}: its config of model_type={values['model_type']}"
    with judged(given, f"mend {key}.config or the folder in {key}.path"):
        inner = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        ).float()
        _require_causal(inner, given)
        return LanguageModel(inner, activation_checkpointing, precision)


def load(folder: Path, vocabulary: int, key: str, precision: str = "fp32") -> LanguageModel:
    """A saved model. Its embedding may have entries beyond the vocabulary, which its losses count:
    they are what it was trained with.

    Raises UserError where it is missing, broken or of another vocabulary.
    """
    inner = read(folder, key)
    entries, own = inner.config.vocab_size, _vocabulary(folder, key)
    if entries < vocabulary or own not in (vocabulary, None):
        raise UserError(
            f"{key}={folder}: its vocabulary has {entries if own is None else own} entries, the "
            f"data's tokeniser {vocabulary}; use the tokeniser it was trained with "
            "(data.tokenizer), or train a reference"
        )
    return LanguageModel(inner, precision=precision)


def read(folder: Path, key: str) -> Any:
    """The transformers model of a local folder, from safetensors only, in float32; of a multimodal
    one, its text model. No code in it is run.

    Raises UserError where it is missing or broken, quantised, or sees what it is to predict.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the stages' own
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{key}={folder}: its weights are a pickle, which can run code when it is loaded, and "
            "only safetensors are read; load it with transformers where you trust it, and save it "
            "with save_pretrained()"
        )
    given, how = f"{key}={folder}", {"local_files_only": True, "trust_remote_code": False}
    with judged(given, REMEDY):
        config = AutoConfig.from_pretrained(folder, **how)
        quantised = getattr(config, "quantization_config", None)
        if quantised:
            raise UserError(
                f"{given}: its weights are quantised ({quantised!s:.100}), and only plain ones "
                "are trained and compared; dequantise it with transformers, and save it with "
                "save_pretrained()"
            )
        text = config.get_text_config()
        one_of = type(config) in AutoModelForCausalLM._model_mapping
        returned: Any = (
            AutoModelForCausalLM if one_of or text is config else AutoModelForMultimodalLM
        ).from_pretrained(
            folder, **how, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        inner, loaded = returned
    absent = sorted(loaded["missing_keys"])
    if absent:  # transformers would fill them with random numbers
        raise UserError(
            f"{key}={folder}: its files lack {', '.join(absent[:5])}; give a complete model folder"
        )
    with judged(given, REMEDY):
        inner = inner if text is config else _text_model(inner)
        _require_causal(inner, given)
    return inner


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
) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load; `end` is the id that ends a
    document.

    `tensors` are the model's, whole and by name: its own may be in parts on many processes.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    with naming_the_disk(folder):
        model.inner.save_pretrained(folder, state_dict=of_inner(tensors))
    token = tokenizer.id_to_token(end)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=token, eos_token=token
    ).save_pretrained(folder)


def of_inner(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a LanguageModel by their names in the transformers model."""
    return {name.removeprefix("inner."): tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def naming_the_disk(folder: Path) -> Iterator[None]:
    """What safetensors says of a full disk, as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        cause = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(cause[1]), str(error), str(folder)) if cause else error) from None


def folder_fingerprint(folder: Path) -> str:
    """Content address of a saved model's weights and config."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]
