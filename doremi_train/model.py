"""Causal language models from a transformers config, and their per-token losses.

B sequences, T tokens, V vocabulary, d hidden size.
"""

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn

from doremi_train.config import STRICT, UserError, conf_dir
from doremi_train.projection import Projection

# Where the projection is fused with the loss. Logits that may exist at once: where there are more it is, in chunks of
# so many. And a hidden size up to which it always is on a CPU, for computing the logits again then takes less time than
# moving them through memory. Seen there on one thread, 2026-11-21, fused over plain: of a training step 0.87 for tiny
# (d = 64), 0.98 for mini (128), 1.02 for small (256) with 1024 entries; of the projection alone with 8 M logits or more
# 0.65 to 0.75 for d = 64, 0.9 to 1.1 for 256. On a GPU matrices must be large; that number is not measured.
_LOGITS_ON_CPU, _LOGITS_ELSEWHERE = 1 << 22, 1 << 26
_NARROW_ON_CPU = 128


@dataclass(frozen=True, config=STRICT)
class Options:
    """A model is a transformers config, as a mapping with `model_type` or as a local folder or config.json."""

    config: dict[str, Any] | None = None
    path: str | None = None


def preset(name: str, key: str) -> dict[str, Any]:
    """The mapping in `conf/model/NAME.yaml`. Raises UserError listing the presets where there is none."""
    import yaml

    folder = conf_dir() / "model"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise UserError(f"{key}={name}: no such model; allowed: {', '.join(names)}")
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def resolve(options: Options, vocabulary: int, end: int, length: int, key: str = "model") -> dict[str, Any]:
    """The complete transformers config as plain JSON: what a run is addressed by and built from.

    `vocabulary` is its size and `end` the id that ends a document, both the tokeniser's.

    Raises UserError where the config is unknown, wrong, or too short for sequences of `length` tokens.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if (options.config is None) == (options.path is None):
        raise UserError(f"{key}: give one of {key}.config and {key}.path, or a preset such as {key}=tiny")
    values = dict(options.config) if options.config else _read_config(Path(str(options.path)), key)
    kind = values.pop("model_type", None)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{key}.config.model_type={kind!r}: must be a causal language model of transformers, "
            "such as gpt_neox, llama, gpt2 or qwen3"
        )
    values |= {"vocab_size": vocabulary, "bos_token_id": end, "eos_token_id": end}
    known = AutoConfig.for_model(kind).to_dict()
    for name in options.config or {}:
        if name not in known | {"model_type": kind}:  # transformers would keep it and never look at it
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{key}.config.{name}: not an option of {kind} models in transformers{hint}")
    try:
        config = AutoConfig.for_model(kind, **values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}.config: transformers refuses it: {error}") from None
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        if "max_position_embeddings" in values or "n_positions" in values:
            raise UserError(
                f"training.sequence_length={length}: {key} has only {positions} positions; "
                f"shorten it or raise {key}.config.max_position_embeddings"
            )
        config.max_position_embeddings = length
    plain = json.loads(config.to_json_string(use_diff=True))
    plain.pop("transformers_version", None)  # the same model under another version is the same model
    return plain | {"vocab_size": vocabulary, "model_type": kind}


def _read_config(path: Path, key: str) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{key}.path={path}: not a transformers config.json or a folder with one ({error})") from None


class LanguageModel(nn.Module):
    """A transformers causal model whose forward gives per-token losses, so that a wrapper (DDP, …) sees one call."""

    def __init__(self, inner: Any, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.inner = inner
        inner.config.use_cache = False
        if activation_checkpointing:
            inner.activation_checkpointing_enable({"use_reentrant": False})
        self.precision = "fp32"  # of the forward and backward; parameters stay float32
        self.projection = Projection(inner.get_output_embeddings()) if _head_is_plain(inner) else None

    def forward(self, tokens: Tensor) -> Tensor:
        """Losses (B, T), float32 nats, of targets tokens[:, 1:] given inputs tokens[:, :-1]; tokens (B, T + 1)."""
        # Here and not around the call, because wrappers such as DeepSpeed's switch autocast off.
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._losses(tokens)

    def blocks(self) -> list[nn.Module]:
        """The transformer's layers, in order: what is sharded, and compiled, one by one."""
        names = set(self.inner._no_split_modules or ())
        return [module for module in self.inner.modules() if type(module).__name__ in names]

    def _losses(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        vocabulary, device, project = self.inner.config.vocab_size, tokens.device.type, self.projection
        if project is None or not fuses(targets.numel(), vocabulary, project.hidden_size, device):
            return _cross_entropy(self.inner(input_ids=inputs).logits, targets)
        hidden = self.inner.base_model(input_ids=inputs).last_hidden_state  # (B, T, d)
        at_once = logits_at_once(targets.numel(), vocabulary, device)
        return project(hidden.flatten(0, 1), targets.flatten(), at_once).view(targets.shape).float()


class CompletionModel(LanguageModel):
    """The same where some tokens carry no loss: those are given as their complement ~id, and their loss is 0."""

    def forward(self, tokens: Tensor) -> Tensor:
        carrying = tokens >= 0
        return super().forward(torch.where(carrying, tokens, ~tokens)).masked_fill(~carrying[:, 1:], 0.0)


def fuses(tokens: int, vocabulary: int, hidden_size: int, device: str) -> bool:
    """Whether the loss of so many tokens is computed without their logits; on a `device` of this type, cpu or cuda."""
    narrow = device == "cpu" and hidden_size <= _NARROW_ON_CPU
    return narrow or logits_at_once(tokens, vocabulary, device) < tokens * vocabulary


def logits_at_once(tokens: int, vocabulary: int, device: str) -> int:
    """How many logits of so many tokens exist at one time."""
    return min(tokens * vocabulary, _LOGITS_ON_CPU if device == "cpu" else _LOGITS_ELSEWHERE)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(…, V), (…) → (…) float32. No float32 copy of all the logits is kept where they are bf16."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.float().view(targets.shape)


def _head_is_plain(inner: Any) -> bool:
    """Whether the logits are the output embedding of the last hidden state and nothing more (no cap, no scale)."""
    probe = torch.arange(4, device=inner.device).remainder(inner.config.vocab_size)[None]
    was_training = inner.training
    inner.eval()
    with torch.no_grad(), contextlib.suppress(AttributeError, TypeError):
        hidden = inner.base_model(input_ids=probe).last_hidden_state
        head = inner.get_output_embeddings()
        plain = isinstance(head, nn.Linear) and torch.equal(head(hidden), inner(input_ids=probe).logits)
        inner.train(was_training)
        return plain
    inner.train(was_training)
    return False


def build(config: dict[str, Any], seed: int, activation_checkpointing: bool = False) -> LanguageModel:
    """A freshly initialised model: the same parameters for the same config and seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    torch.manual_seed(seed)
    inner = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    return LanguageModel(inner.float(), activation_checkpointing)


def load(folder: Path, vocabulary: int, key: str) -> LanguageModel:
    """A saved model. Raises UserError where it is missing, broken or of another vocabulary."""
    inner = read(folder, key)
    if inner.config.vocab_size != vocabulary:
        raise UserError(
            f"{key}={folder}: its vocabulary has {inner.config.vocab_size} entries, the data's tokeniser {vocabulary}; "
            "use the tokeniser it was trained with (data.tokenizer), or train a reference"
        )
    return LanguageModel(inner)


def read(folder: Path, key: str) -> Any:
    """The transformers model of a local folder, from safetensors only, in float32; no code in it is run.

    Raises UserError where it is missing or broken.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress is the stages' own
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{key}={folder}: its weights are a pickle, which can run code when it is loaded, and only safetensors "
            "are read; load it with transformers where you trust it, and save it with save_pretrained()"
        )
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        inner, loaded = found
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key}={folder}: not a model folder that transformers loads ({error})") from None
    absent = sorted(loaded["missing_keys"])
    if absent:  # transformers would fill them with random numbers
        raise UserError(f"{key}={folder}: its files lack {', '.join(absent[:5])}; give a complete model folder")
    return inner


def save(model: LanguageModel, tensors: Mapping[str, Tensor], folder: Path, tokenizer: Tokenizer, end: int) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load; `end` is the id that ends a document.

    `tensors` are the model's, whole and by name: its own may be in parts on many processes.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    with naming_the_disk(folder):
        model.inner.save_pretrained(folder, state_dict=of_inner(tensors))
    token = tokenizer.id_to_token(end)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=token, eos_token=token).save_pretrained(folder)


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


def skeleton(config: dict[str, Any]) -> Any:
    """The transformers model with shapes alone: its parameters hold no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def parameters(config: dict[str, Any]) -> tuple[int, int]:
    """(all, without embeddings) parameter counts, from shapes alone."""
    inner = skeleton(config)
    total = sum(p.numel() for p in inner.parameters())
    embeddings = {id(m.weight): m.weight.numel() for m in inner.modules() if isinstance(m, nn.Embedding)}
    return total, total - sum(embeddings.values())
