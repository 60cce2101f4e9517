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

from doremi_train.config import UserError
from doremi_train.model.language_model import LanguageModel


def build(
    config: dict[str, Any],
    seed: int,
    activation_checkpointing: bool = False,
    precision: str = "fp32",
) -> LanguageModel:
    """A freshly initialised model: the same parameters for the same config and seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    torch.manual_seed(seed)
    inner = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values)
    )
    return LanguageModel(inner.float(), activation_checkpointing, precision)


def load(folder: Path, vocabulary: int, key: str, precision: str = "fp32") -> LanguageModel:
    """A saved model. Raises UserError where it is missing, broken or of another vocabulary."""
    inner = read(folder, key)
    if inner.config.vocab_size != vocabulary:
        raise UserError(
            f"{key}={folder}: its vocabulary has {inner.config.vocab_size} entries, the data's "
            f"tokeniser {vocabulary}; use the tokeniser it was trained with (data.tokenizer), or "
            "train a reference"
        )
    return LanguageModel(inner, precision=precision)


def read(folder: Path, key: str) -> Any:
    """The transformers model of a local folder, from safetensors only, in float32; no code in it is
    run.

    Raises UserError where it is missing or broken.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the stages' own
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{key}={folder}: its weights are a pickle, which can run code when it is loaded, and "
            "only safetensors are read; load it with transformers where you trust it, and save it "
            "with save_pretrained()"
        )
    try:
        returned: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        inner, loaded = returned
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{key}={folder}: not a model folder that transformers loads ({error})"
        ) from None
    absent = sorted(loaded["missing_keys"])
    if absent:  # transformers would fill them with random numbers
        raise UserError(
            f"{key}={folder}: its files lack {', '.join(absent[:5])}; give a complete model folder"
        )
    return inner


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
