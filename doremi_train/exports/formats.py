"""Export targets: weights in the form of the trainers that people already use, and back.

A target is one entry of `FORMATS`, which says all about it; commands, messages, the table in
`docs/export.md` and tests follow from the entries.

A weight is a part of the tokens. A trainer that draws sequences of one length takes it as it is;
one that draws documents needs p_k ∝ w_k / (mean tokens per document of k). Which one draws what is
read off its source, and the entry says where.

Zeros are left out: several trainers reject one, or wait forever for it.
"""

import ast
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import yaml

Unit = Literal["sequences", "documents"]


class Source(NamedTuple):
    """One domain for a trainer."""

    domain: str
    path: str  # where the trainer finds it; for some its name there
    weight: float  # of the trainer's draws, as a decimal; all sum to 1
    epochs: float  # passes over it in the final run


class Stage(NamedTuple):
    """A mixture, and when it begins."""

    step: int  # of the trainer, from 0
    sources: Sequence[Source]


class Format(NamedTuple):
    """An export target: all that the house knows of what one trainer reads."""

    trainer: str  # its name, and of others that read the same file
    file: str  # what the file is, or where it goes (Markdown)
    draws: Unit
    because: str  # what in the trainer's source says so
    ending: str  # of the file's name
    write: Callable[[Sequence[Source]], str]
    read: Callable[[str], Mapping[str, Any]]  # {path or domain: weight}; runs nothing
    paths: bool = True  # False: sources go by name, so export.paths is not needed
    # None: it knows one mixture for the whole run
    write_stages: Callable[[Sequence[Stage]], str] | None = None
    refuses: Callable[[Source], str | None] | None = None  # why it cannot read a source


# Forms


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


def _megatron(sources: Sequence[Source]) -> str:
    return "".join(f"{source.weight} {source.path}\n" for source in sources)


def _read_megatron(text: str) -> dict[str, float]:
    """Weights by path, of this file or of the JSON of --per-split-data-args-path."""
    if not text.lstrip().startswith("{"):
        return _pairs(text.split())
    train = json.loads(text)["train"]
    return _pairs(train.split() if isinstance(train, str) else train)


def _megatron_splits(source: Source) -> str | None:
    """A complaint about a path that is several words."""
    return None if source.path.split() == [source.path] else "Megatron splits at spaces"


def _nemo(sources: Sequence[Source]) -> str:
    return (
        json.dumps(
            [part for source in sources for part in (str(source.weight), source.path)], indent=1
        )
        + "\n"
    )


def _gpt_neox(sources: Sequence[Source]) -> str:
    paths, numbers = _columns(sources)
    return _yaml({"train-data-paths": paths, "train-data-weights": numbers})


def _read_gpt_neox(text: str) -> dict[str, Any]:
    content = {key.replace("_", "-"): value for key, value in yaml.safe_load(text).items()}
    return _once(zip(content["train-data-paths"], content["train-data-weights"], strict=True))


def _nanotron(sources: Sequence[Source]) -> str:
    return _nanotron_stages([Stage(0, sources)])


def _nanotron_stages(stages: Sequence[Stage]) -> str:
    entries = []
    for step, sources in stages:
        paths, numbers = _columns(sources)
        data = {"dataset": {"dataset_folder": paths, "dataset_weights": numbers}}
        name = f"mixture from step {step + 1}" if len(stages) > 1 else "mixture"
        entries.append({"name": name, "start_training_step": step + 1, "data": data})
    return _yaml({"data_stages": entries})


def _read_nanotron(text: str) -> dict[str, Any]:
    dataset = _only(yaml.safe_load(text)["data_stages"])["data"]["dataset"]
    return _once(zip(dataset["dataset_folder"], dataset["dataset_weights"], strict=True))


def _mosaicml_streaming(sources: Sequence[Source]) -> str:
    return _yaml(
        {"streams": {s.domain: {"remote": s.path, "proportion": s.weight} for s in sources}}
    )


def _read_mosaicml_streaming(text: str) -> dict[str, Any]:
    return {name: stream["proportion"] for name, stream in yaml.safe_load(text)["streams"].items()}


def _olmo_core(sources: Sequence[Source]) -> str:
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


def _read_olmo_core(text: str) -> dict[str, Any]:
    return _once(
        (source["source_name"], source["target_ratio"])
        for source in yaml.safe_load(text)["sources"]
    )


def _levanter(sources: Sequence[Source]) -> str:
    return _yaml({"data": {"train_weights": _by_path(sources)}})


def _levanter_stages(stages: Sequence[Stage]) -> str:
    return _yaml(
        {"data": {"train_weights": [[step, _by_path(sources)] for step, sources in stages]}}
    )


def _read_levanter(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text)
    weights = content.get("data", content)["train_weights"]
    return dict(weights) if isinstance(weights, Mapping) else dict(_only(weights)[1])


def _lingua(sources: Sequence[Source]) -> str:
    return _yaml({"data": {"sources": _by_path(sources)}})


def _read_lingua(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text)["data"]["sources"])


def _doremi(sources: Sequence[Source]) -> str:
    weights = _by_path(sources)
    content = {"train_domain_weights": weights, "eval_domain_weights": weights}
    return json.dumps(content, indent=1) + "\n"


def _read_doremi(text: str) -> dict[str, Any]:
    return dict(json.loads(text)["train_domain_weights"])


def _module(imports: str, body: str) -> Callable[[Sequence[Source]], str]:
    """A writer of Python modules: the weights as SOURCES, and `body`, which makes of them what the
    trainer takes."""

    def write(sources: Sequence[Source]) -> str:
        lines = "".join(f"    {path!r}: {weight},\n" for path, weight in _by_path(sources).items())
        return f"{imports}\n\nSOURCES = {{\n{lines}}}\n\n\n{body}"

    return write


def _read_module(text: str) -> dict[str, Any]:
    """SOURCES of a Python module, which is parsed and not run."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SOURCES":
            return dict(ast.literal_eval(node.value))
    raise ValueError("no SOURCES = {…}")


# A backslash ends a line of ours that goes on in the line that is written.
_datasets = _module(
    "from datasets import interleave_datasets, load_dataset",
    '''def mixture(seed=0, \
open_source=lambda path: load_dataset(path, split="train", streaming=True)):
    """One dataset; a draw is a row of one source, so rows must be documents."""
    return interleave_datasets(
        [open_source(path) for path in SOURCES],
        probabilities=list(SOURCES.values()),
        seed=seed,
        stopping_strategy="all_exhausted",
    )
''',
)
_torchtitan = _module(
    "from torchtitan.components.data import WeightedDataset",
    '''def mixture(open_source):
    """The `datasets` of a dataset mix. `open_source(path)` is the config of a packed dataset: \
a draw is a row of it."""
    return tuple(WeightedDataset(dataset=open_source(path), weight=weight) \
for path, weight in SOURCES.items())
''',
)
_litdata = _module(
    "from litdata import CombinedStreamingDataset, StreamingDataset, TokensLoader",
    '''def mixture(block_size, seed=0):
    """One dataset; a draw is a block of tokens of one source."""
    datasets = [
        StreamingDataset(path, item_loader=TokensLoader(block_size=block_size), \
shuffle=True, drop_last=True, seed=seed)
        for path in SOURCES
    ]
    return CombinedStreamingDataset(datasets, seed=seed, \
weights=tuple(SOURCES.values()), iterate_over_all=False)
''',
)
_webdataset = _module(
    "import webdataset",
    '''def mixture(open_source=lambda path: webdataset.WebDataset(path, shardshuffle=False)):
    """One dataset; a draw is a sample of one source, so samples must be documents."""
    return webdataset.RandomMix([open_source(path) for path in SOURCES], \
probs=list(SOURCES.values()), longest=True)
''',
)


FORMATS: dict[str, Format] = {
    "megatron": Format(
        trainer="Megatron-LM",
        file="for `--data-args-path FILE`, or `--data-path $(cat FILE)`",
        draws="sequences",
        because="BlendedDataset indexes samples of GPTDataset, which are of `sequence_length`",
        ending="txt",
        write=_megatron,
        read=_read_megatron,
        refuses=_megatron_splits,
    ),
    "nemo": Format(
        trainer="NeMo",
        file="flat JSON list, for `paths`",
        draws="sequences",
        because="Megatron-LM's BlendedDataset",
        ending="json",
        write=_nemo,
        read=lambda text: _pairs(yaml.safe_load(text)),
    ),
    "gpt_neox": Format(
        trainer="GPT-NeoX",
        file="YAML, `train-data-paths` and `train-data-weights`",
        draws="sequences",
        because="BlendableDataset, as Megatron-LM's; unless `weight_by_num_documents`, which "
        "overrides the weights",
        ending="yml",
        write=_gpt_neox,
        read=_read_gpt_neox,
    ),
    "nanotron": Format(
        trainer="nanotron",
        file="YAML of data stages, several where the mixture is staged",
        draws="sequences",
        because="Nanoset counts samples of `sequence_length` tokens",
        ending="yaml",
        write=_nanotron,
        read=_read_nanotron,
        write_stages=_nanotron_stages,
    ),
    "mosaicml_streaming": Format(
        trainer="MosaicML Streaming, llm-foundry",
        file="YAML `streams`, for llm-foundry's dataset or `Stream(**fields)` of each",
        draws="sequences",
        because="a draw is a sample of the MDS, which llm-foundry writes with `--concat_tokens`",
        ending="yaml",
        write=_mosaicml_streaming,
        read=_read_mosaicml_streaming,
    ),
    "datasets": Format(
        trainer="datasets",
        file="Python, `mixture()` with `interleave_datasets`",
        draws="documents",
        because="`interleave_datasets` draws rows",
        ending="py",
        write=_datasets,
        read=_read_module,
    ),
    "olmo_core": Format(
        trainer="OLMo-core",
        file="YAML of a `SourceMixtureList`",
        draws="sequences",
        because="it takes `target_ratio` · `requested_tokens` tokens of each source",
        ending="yaml",
        write=_olmo_core,
        read=_read_olmo_core,
    ),
    "torchtitan": Format(
        trainer="torchtitan",
        file="Python, `mixture(open_source)` of `WeightedDataset`",
        draws="sequences",
        because="DatasetMix draws elements of its children, here packed datasets",
        ending="py",
        write=_torchtitan,
        read=_read_module,
    ),
    "litdata": Format(
        trainer="LitData, LitGPT",
        file="Python, `mixture(block_size)` with `CombinedStreamingDataset`",
        draws="sequences",
        because="TokensLoader gives blocks of tokens",
        ending="py",
        write=_litdata,
        read=_read_module,
    ),
    "levanter": Format(
        trainer="Levanter",
        file="YAML, `train_weights`, staged where the mixture is",
        draws="sequences",
        because="MixtureDataset draws from datasets of token sequences, in blocks of "
        "`mixture_block_size`",
        ending="yaml",
        write=_levanter,
        read=_read_levanter,
        paths=False,
        write_stages=_levanter_stages,
    ),
    "lingua": Format(
        trainer="lingua",
        file="YAML, `data.sources`",
        draws="documents",
        because="`choose_source` draws lines, which are packed afterwards",
        ending="yaml",
        write=_lingua,
        read=_read_lingua,
        paths=False,
    ),
    "webdataset": Format(
        trainer="webdataset",
        file="Python, `mixture()` with `RandomMix`",
        draws="documents",
        because="RandomMix draws samples, a text each",
        ending="py",
        write=_webdataset,
        read=_read_module,
    ),
    "doremi": Format(
        trainer="DoReMi",
        file="the original's JSON",
        draws="sequences",
        because="it draws examples, which its preprocessing makes of one length",
        ending="json",
        write=_doremi,
        read=_read_doremi,
        paths=False,
    ),
}
"""A mixture for a trainer, and back from its file:

>>> from doremi_train.exports import convert
>>> paths = {"web": "/data/web", "code": "/data/code"}
>>> text = convert.write("megatron", {"web": 0.75, "code": 0.25}, paths, {})
>>> print(text)
0.75 /data/web
0.25 /data/code
<BLANKLINE>
>>> convert.read("megatron", text, ["code", "web"], paths, "the file")
{'code': 0.25, 'web': 0.75}
"""
