"""Export targets whose file is a Python module: what each holds, and its weights read back."""

import ast
import math
from collections.abc import Callable, Sequence
from typing import Any

from doremi_train.exports.form import Source


def _module(imports: str, body: str) -> Callable[[Sequence[Source]], str]:
    """A writer of Python modules: the weights as SOURCES, and `body`, which makes of them what the
    trainer takes."""

    def write(sources: Sequence[Source]) -> str:
        lines = "".join(f"    {source.path!r}: {source.weight},\n" for source in sources)
        return f"{imports}\n\nSOURCES = {{\n{lines}}}\n\n\n{body}"

    return write


def read_module(text: str) -> dict[str, Any]:
    """SOURCES of a Python module, which is parsed and not run."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SOURCES":
            return dict(ast.literal_eval(node.value))
    raise ValueError("no SOURCES = {…}")


# load_dataset takes a file only by the name of its builder.
_OPEN_SOURCE = '''BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "txt": "text",
            "csv": "csv", "arrow": "arrow", "tar": "webdataset"}


def open_source(path, streaming=True):
    """Rows of files (a path or a glob), or of a folder or a repository that holds them."""
    ending = path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    if ending in BUILDERS:
        return load_dataset(BUILDERS[ending], data_files=path, split="train", streaming=streaming)
    return load_dataset(path, split="train", streaming=streaming)
'''

datasets = _module(
    "from datasets import interleave_datasets, load_dataset",
    _OPEN_SOURCE
    + '''

def mixture(seed=0, open_source=open_source):
    """One dataset; a draw is a row of one source, so rows must be documents."""
    return interleave_datasets(
        [open_source(path) for path in SOURCES],
        probabilities=list(SOURCES.values()),
        seed=seed,
        stopping_strategy="all_exhausted",
    )
''',
)

# Imports stand in the functions: what one version has, the other lacks.
torchtitan = _module(
    "import functools\n\nfrom datasets import load_dataset",
    _OPEN_SOURCE
    + '''

def mixture(open_source=functools.partial(open_source, streaming=False), text_key="text", seed=0):
    """A dataloader's config for torchtitan 0.3: a draw is a packed sequence of one source. What is
    streamed begins each pass where a resumed run began, so that it is not by default."""
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets import text_datasets as titan

    titan.DATASETS["source"] = DatasetConfig(
        path="", loader=open_source, sample_processor=lambda row: row[text_key]
    )
    return titan.InterleavedHuggingFaceTextDataLoader.Config(
        sources=[
            titan.HFDataSource(dataset="source", dataset_path=path, weight=weight, infinite=True)
            for path, weight in SOURCES.items()
        ],
        seed=seed,
    )


def mixture_of_main(open_source):
    """The `datasets` of a dataset mix, for torchtitan's main. `open_source(path)` is the config
    of a packed dataset: a draw is a row of it."""
    from torchtitan.components.data import WeightedDataset

    return tuple(
        WeightedDataset(dataset=open_source(path), weight=weight)
        for path, weight in SOURCES.items()
    )
''',
)

_composable = _module(
    """from olmo_core.data.composable import (
    ConcatAndChunkInstanceSource,
    MixingInstanceSource,
    NumpyDocumentSource,
)""",
    '''def mixture(tokenizer, sequence_length, num_tokens, seed=0):
    """The config of an instance source of `num_tokens`, the whole run's: build it for a
    ComposableDataLoader. It refuses more passes over a source than were planned, and a source
    that gets less than a sequence, which is left out here."""
    kept = {path: part for path, part in SOURCES.items() if part * num_tokens >= sequence_length}
    return MixingInstanceSource.Config(
        source_specs=[
            MixingInstanceSource.Spec.Config(
                source=ConcatAndChunkInstanceSource.Config(
                    sources=[NumpyDocumentSource.Config(source_paths=[path], tokenizer=tokenizer)],
                    sequence_length=sequence_length,
                ),
                ratio=weight / sum(kept.values()),
                max_repetition_factor=MOST_PASSES[path],
                label=path,
            )
            for path, weight in kept.items()
        ],
        num_tokens=num_tokens,
        seed=seed,
    )
''',
)


def olmo_core_composable(sources: Sequence[Source]) -> str:
    # More than planned: what is left of a file's end is in no instance.
    passes = {source.path: 1.0 + math.floor(source.epochs) for source in sources}
    lines = "".join(f"    {path!r}: {most},\n" for path, most in passes.items())
    return _composable(sources) + f"\n\nMOST_PASSES = {{\n{lines}}}\n"


litdata = _module(
    "from litdata import CombinedStreamingDataset, StreamingDataset, TokensLoader",
    '''class Endless(StreamingDataset):
    """A source that begins anew in another order when it is at its end, so that the mixture's
    one sequence of draws goes on."""

    def __next__(self):
        try:
            return super().__next__()
        except StopIteration:  # it has gone to the next epoch
            iter(self)
            return super().__next__()

    def load_state_dict(self, state_dict):
        """A state counts the draws of all passes; what is resumed is the place in one of them."""
        state = dict(state_dict)
        length = self.get_len(state["num_workers"], state["batch_size"])
        passes, within = divmod(state["num_samples_yielded"], length)
        state["current_epoch"] = max(state["current_epoch"], 1 + passes)
        state["num_samples_yielded"] = within
        state["sample_in_epoch"] = within * state["world_size"]
        super().load_state_dict(state)


def mixture(block_size, seed=0):
    """One dataset without end; a draw is a block of tokens of one source."""
    datasets = [
        Endless(
            path,
            item_loader=TokensLoader(block_size=block_size),
            shuffle=True,
            drop_last=True,
            seed=seed,
        )
        for path in SOURCES
    ]
    return CombinedStreamingDataset(
        datasets, seed=seed, weights=tuple(SOURCES.values()), iterate_over_all=False
    )
''',
)

webdataset = _module(
    "import itertools\n\nimport webdataset",
    '''class Source:
    """Samples of one source, read again and again. Nodes and DataLoader workers share its tars,
    or its samples where it has fewer tars than there are readers."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        rank, nodes, worker, workers = webdataset.utils.pytorch_worker_info()
        own, readers = rank * workers + worker, nodes * workers
        tars = webdataset.shardlists.expand_urls(self.path)
        by_tar = len(tars) >= readers
        samples = webdataset.WebDataset(
            tars[own::readers] if by_tar else tars,
            shardshuffle=False,
            nodesplitter=None,
            workersplitter=None,
        )
        endless = itertools.chain.from_iterable(itertools.repeat(samples))
        return endless if by_tar else itertools.islice(endless, own, None, readers)


def mixture(open_source=Source):
    """One dataset without end; a draw is a sample of one source, so samples must be documents.
    It is drawn by Python's `random`: seed it otherwise in each process. What comes after it, as
    `webdataset.DataPipeline(mixture(), webdataset.shuffle(1000))`, sees all sources."""
    return webdataset.RandomMix(
        [open_source(path) for path in SOURCES], probs=list(SOURCES.values())
    )
''',
)


def webdataset_cuts(source: Source) -> str | None:
    """A complaint about a path that it would take for a URL with a query."""
    if "://" not in source.path and set(source.path) & set("?#;"):
        return "webdataset cuts a path at ?, # and ;"
    return None
