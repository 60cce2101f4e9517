"""Export targets whose file is text, JSON or YAML: how each is written, and read back."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import yaml

from doremi_train.exports.form import Source, Stage

# Levanter packs a source and a place in the block into 32 bits.
_LARGEST_BLOCK = 2**16 - 1
_BLOCK = 2048  # Levanter's default, in sequences
_LOST = 0.05  # part of a weight that a block may round away


def _pairs(flat: Sequence[Any]) -> dict[str, float]:
    """Weights by path, of [weight, path, weight, path, …]."""
    return _once(
        (str(path), float(weight)) for weight, path in zip(flat[::2], flat[1::2], strict=True)
    )


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Weights by path. Raises ValueError for a path that is there twice."""
    weights: dict[str, Any] = {}
    for path, weight in pairs:
        if path in weights:
            raise ValueError(f"{path} is there twice")
        weights[path] = weight
    return weights


def _only(stages: Sequence[Any]) -> Any:
    """The one stage. Raises ValueError where there are several."""
    if len(stages) != 1:
        raise ValueError(
            f"it has {len(stages)} stages, and a mixture is one; keep the one that is meant"
        )
    return stages[0]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _by_path(sources: Sequence[Source]) -> dict[str, float]:
    return {source.path: source.weight for source in sources}


def _columns(sources: Sequence[Source]) -> tuple[list[str], list[float]]:
    return [source.path for source in sources], [source.weight for source in sources]


def megatron(sources: Sequence[Source]) -> str:
    return "".join(f"{source.weight} {source.path}\n" for source in sources)


def read_megatron(text: str) -> dict[str, float]:
    """Weights by path, of this file or of the JSON of --per-split-data-args-path."""
    if not text.lstrip().startswith("{"):
        return _pairs(text.split())
    train = json.loads(text)["train"]
    return _pairs(train.split() if isinstance(train, str) else train)


def megatron_splits(source: Source) -> str | None:
    """A complaint about a path that is several words."""
    return None if source.path.split() == [source.path] else "Megatron splits at spaces"


def nemo(sources: Sequence[Source]) -> str:
    flat = [part for source in sources for part in (str(source.weight), source.path)]
    return json.dumps(flat, indent=1) + "\n"


def read_nemo(text: str) -> dict[str, float]:
    return _pairs(yaml.safe_load(text))


def gpt_neox(sources: Sequence[Source]) -> str:
    paths, numbers = _columns(sources)
    return _yaml({"train-data-paths": paths, "train-data-weights": numbers})


def read_gpt_neox(text: str) -> dict[str, Any]:
    content = {key.replace("_", "-"): value for key, value in yaml.safe_load(text).items()}
    return _once(zip(content["train-data-paths"], content["train-data-weights"], strict=True))


def gpt_neox_tells(stages: Sequence[Mapping[str, float]]) -> list[str]:
    return ["it wants all three: add valid-data-paths and test-data-paths beside these"]


def nanotron(sources: Sequence[Source]) -> str:
    return nanotron_stages([Stage(0, sources)], 1)


def nanotron_stages(stages: Sequence[Stage], batch_size: int) -> str:
    entries = []
    for step, sources in stages:
        paths, numbers = _columns(sources)
        data = {"dataset": {"dataset_folder": paths, "dataset_weights": numbers}}
        name = f"mixture from step {step + 1}" if len(stages) > 1 else "mixture"
        entries.append({"name": name, "start_training_step": step + 1, "data": data})
    return _yaml({"data_stages": entries})


def nanotron_tells(stages: Sequence[Mapping[str, float]]) -> list[str]:
    if len(stages) == 1:
        return []
    return [
        "its run_train.py makes the data of the last stage only: train a stage at a time, each "
        "from the checkpoint before, with the stages up to it in the file and tokens.train_steps "
        "at its end"
    ]


def read_nanotron(text: str) -> dict[str, Any]:
    dataset = _only(yaml.safe_load(text)["data_stages"])["data"]["dataset"]
    return _once(zip(dataset["dataset_folder"], dataset["dataset_weights"], strict=True))


def mosaicml_streaming(sources: Sequence[Source]) -> str:
    streams = {s.domain: _place(s) | {"proportion": s.weight} for s in sources}
    # Unshuffled, one stream would come after another.
    return _yaml({"streams": streams, "shuffle": True})


def _place(source: Source) -> dict[str, str]:
    """A folder is read where it is; of a URL a copy is kept, which a second start finds again."""
    path = source.path.removeprefix("file://")
    if "://" not in path:
        return {"local": path}
    return {"remote": path, "local": f"streams/{quote(source.domain, safe='')}"}


def read_mosaicml_streaming(text: str) -> dict[str, Any]:
    return {name: stream["proportion"] for name, stream in yaml.safe_load(text)["streams"].items()}


def energon(sources: Sequence[Source]) -> str:
    blend = [{"weight": source.weight, "path": source.path} for source in sources]
    head = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
    return _yaml(head | {"splits": {"train": {"blend": blend}}})


def read_energon(text: str) -> dict[str, Any]:
    blend = yaml.safe_load(text)["splits"]["train"]["blend"]
    return _once((source["path"], source["weight"]) for source in blend)


def llama_factory(sources: Sequence[Source]) -> str:
    names, numbers = _columns(sources)
    return _yaml(
        {
            "dataset": ",".join(names),
            "mix_strategy": "interleave_over",
            "interleave_probs": ",".join(map(str, numbers)),
        }
    )


def read_llama_factory(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    names, numbers = (str(content[key]).split(",") for key in ("dataset", "interleave_probs"))
    return _once(zip(map(str.strip, names), map(float, numbers), strict=True))


def llama_factory_splits(source: Source) -> str | None:
    """A complaint about a name that is several."""
    whole = "," not in source.path and source.path.strip() == source.path
    return None if whole else "LLaMA-Factory splits at commas, and cuts spaces"


def llama_factory_tells(stages: Sequence[Mapping[str, float]]) -> list[str]:
    return [
        "it wants an entry of each of these names in the dataset_info.json of dataset_dir",
        "an epoch is the rows that it takes until every source has ended once; where a small "
        "weight makes that too many, set streaming=true, max_steps, and dataloader_num_workers to "
        "1 or more",
    ]


def maxtext(sources: Sequence[Source]) -> str:
    content = {s.domain: {"path": s.path, "weight": s.weight} for s in sources}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_maxtext(text: str) -> dict[str, Any]:
    return {name: float(source["weight"]) for name, source in json.loads(text).items()}


def maxtext_reads(source: Source) -> str | None:
    """A complaint about a place that it knows nothing of."""
    scheme, found, _ = source.path.partition("://")
    return None if not found or scheme in ("gs", "hf") else "MaxText reads files, gs:// and hf://"


def maxtext_tells(stages: Sequence[Mapping[str, float]]) -> list[str]:
    return [
        "it goes with dataset_type=grain and grain_file_type=arrayrecord; the data ends where the "
        "first source does, so set num_epoch to more passes than any of them gets"
    ]


def olmo_core(sources: Sequence[Source]) -> str:
    # It refuses a source that would be repeated more often than it may.
    return _yaml(
        {
            "sources": [
                {
                    "source_name": source.domain,
                    "target_ratio": source.weight,
                    "paths": [source.path],
                    "max_repetition_ratio": float(max(1, math.ceil(source.epochs))),
                }
                for source in sources
            ]
        }
    )


def read_olmo_core(text: str) -> dict[str, Any]:
    return _once(
        (source["source_name"], source["target_ratio"])
        for source in yaml.safe_load(text)["sources"]
    )


def levanter(sources: Sequence[Source]) -> str:
    weights = _by_path(sources)
    block = _levanter_block(weights.values(), 1)
    return _yaml({"data": {"train_weights": weights, "mixture_block_size": block}})


def levanter_stages(stages: Sequence[Stage], batch_size: int) -> str:
    weights = [[step, _by_path(sources)] for step, sources in stages]
    every = [source.weight for stage in stages for source in stage.sources]
    block = _levanter_block(every, batch_size)
    return _yaml({"data": {"train_weights": weights, "mixture_block_size": block}})


def levanter_every(weights: Iterable[float], batch_size: int) -> int:
    """Steps that the start of a stage must be a multiple of: there a block ends."""
    block = _levanter_block(weights, batch_size)
    return block // math.gcd(block, batch_size)


def levanter_tells(stages: Sequence[Mapping[str, float]]) -> list[str]:
    told = [
        "it wants their data too: data.components, or data.configs of older ones, with an entry "
        "of each of these names"
    ]
    small = [
        name
        for stage in stages
        for name, weight in stage.items()
        if 0 < weight * _LARGEST_BLOCK < 1
    ]
    lost = list(dict.fromkeys(small))
    if lost:
        told.append(
            f"its largest block has {_LARGEST_BLOCK} sequences, so that it draws nothing of "
            f"{', '.join(lost)}, whose weight is less than one of them"
        )
    return told


def _levanter_block(weights: Iterable[float], batch_size: int) -> int:
    """Sequences of a block, of which each source gets floor(weight · block) and the largest source
    the rest: about the default, doubled until no weight loses more than `_LOST`, or as many as
    there may be. Whole batches, if they fit, so that stages may begin often."""
    positive = [weight for weight in weights if weight > 0]
    whole = batch_size if batch_size < _LARGEST_BLOCK else 1
    block = whole * math.ceil(_BLOCK / whole)
    while any(math.floor(weight * block) < (1 - _LOST) * weight * block for weight in positive):
        if 2 * block > _LARGEST_BLOCK:
            return whole * (_LARGEST_BLOCK // whole)
        block *= 2
    return block


def read_levanter(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    weights = content.get("data", content)["train_weights"]
    return dict(weights) if isinstance(weights, Mapping) else dict(_only(weights)[1])


def lingua(sources: Sequence[Source]) -> str:
    return _yaml({"data": {"sources": _by_path(sources)}})


def read_lingua(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text)["data"]["sources"])


def doremi(sources: Sequence[Source]) -> str:
    weights = _by_path(sources)
    content = {"train_domain_weights": weights, "eval_domain_weights": weights}
    return json.dumps(content, indent=1) + "\n"


def read_doremi(text: str) -> dict[str, Any]:
    return dict(json.loads(text)["train_domain_weights"])
