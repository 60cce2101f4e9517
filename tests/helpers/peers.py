"""Run by the interpreter of DOREMI_PEERS, without our packages: real trainers' loaders on what was
exported.

`peers.py TARGET FOLDER` makes data of each domain of `FOLDER/domains.json` ({domain: [path,
samples]}) in the trainer's format, builds its dataset from the exported `FOLDER/mixture.*`, draws
`DRAWS` samples in several settings, and prints one JSON line: {setting: {domain: draws}}.
"""

import collections
import contextlib
import gzip
import importlib
import itertools
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

DRAWS = 4000
BLOCK = 8  # tokens of a sequence


def counted(drawn, draws=DRAWS):
    return dict(collections.Counter(itertools.islice(drawn, draws)))


def module(folder):
    """The exported module, where spawned workers find it too."""
    sys.path.insert(0, str(folder))
    return importlib.import_module("mixture")


def domains(folder):
    return json.loads((folder / "domains.json").read_text())


def on_two_ranks(target, folder):
    """What two processes draw together, each as a rank of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    running = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, target, str(folder)]
        running.append(
            subprocess.Popen(command, env=os.environ | meeting | own, stdout=subprocess.PIPE)
        )
    both = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    return dict(sum((collections.Counter(part) for part in both), collections.Counter()))


def webdataset(folder, rank):
    import random

    import torch
    import webdataset

    if rank is None:
        for name, (path, samples) in domains(folder).items():
            with webdataset.TarWriter(path) as writer:
                for number in range(samples):
                    writer.write({"__key__": f"{number}", "txt": name})
    seed = int(rank or 0)
    random.seed(seed)
    torch.manual_seed(seed)
    exported = module(folder)

    def drawn(workers=0):
        loader = torch.utils.data.DataLoader(exported.mixture(), None, num_workers=workers)
        return counted(sample["txt"].decode() for sample in loader)

    if rank is not None:
        return drawn(2)
    return {"alone": drawn(), "workers": drawn(2), "ranks": on_two_ranks("webdataset", folder)}


def megatron(folder, rank):
    import numpy
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from megatron.core.datasets.utils import get_blend_from_list

    names = list(domains(folder))
    for name, (path, samples) in domains(folder).items():
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=numpy.int32)
        for _ in range(samples):
            builder.add_item(torch.full((BLOCK + 1,), 1 + names.index(name), dtype=torch.int32))
            builder.end_document()
        builder.finalize(f"{path}.idx")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    blend = get_blend_from_list((folder / "mixture.txt").read_text().split())  # --data-args-path
    same = blend == get_blend_from_list(json.loads((folder / "mixture.json").read_text()))
    tokenizer = types.SimpleNamespace(eod=0, unique_identifiers={}, pad=None, vocab_size=10)
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=BLOCK,
        blend=blend,
        split="1,0,0",
        path_to_cache=str(folder / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [DRAWS, 0, 0], lambda: True, config)
    samples = builder.build()[0]
    alone = counted(names[int(samples[n]["tokens"][0]) - 1] for n in range(DRAWS))
    torch.distributed.destroy_process_group()
    return {"alone": alone, "nemo": {"same": same}}


@contextlib.contextmanager
def without_pictures():
    """mosaicml-streaming asks for torchvision at import, and PyPI's does not load beside a CPU
    build of torch."""
    import transformers  # noqa: F401 — streaming imports it, and it looks for the real one

    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    modules = {name: types.ModuleType(name) for name in names}
    modules["torchvision.datasets"].VisionDataset = object
    modules["torchvision.transforms.functional"].to_tensor = None
    sys.modules.update(modules)
    yield
    for name in names:
        del sys.modules[name]


def mosaicml_streaming(folder, rank):
    import yaml
    from torch.utils.data import DataLoader

    with without_pictures():
        from streaming import MDSWriter, Stream, StreamingDataset

    if rank is None:
        for name, (path, samples) in domains(folder).items():
            with MDSWriter(out=path.removeprefix("file://"), columns={"domain": "str"}) as writer:
                for _ in range(samples):
                    writer.write({"domain": name})
    os.chdir(folder)  # where copies of remote streams are kept
    config = yaml.safe_load((folder / "mixture.yaml").read_text())
    streams = [Stream(**fields) for fields in config.pop("streams").values()]
    dataset = StreamingDataset(streams=streams, batch_size=10, epoch_size=DRAWS, **config)
    if rank is not None:
        return counted(sample["domain"] for sample in dataset)  # a half of DRAWS each
    drawn = [sample["domain"] for sample in DataLoader(dataset, None, num_workers=2)]
    again = counted(sample["domain"] for sample in DataLoader(dataset, None, num_workers=2))
    found = {"workers": counted(drawn), "first": counted(drawn, 20), "again": again}
    return found | {"ranks": on_two_ranks("mosaicml_streaming", folder)}


def written(path, rows):
    """Rows in a file of the kind that its ending says, or in a folder."""
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    if not path.suffix:
        path.mkdir()
        path /= "train.jsonl"
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def datasets(folder, rank):
    from datasets import config
    from datasets.distributed import split_dataset_by_node
    from torch.utils.data import DataLoader

    config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # seconds; it waits 5 after each stream of parquet
    for name, (path, samples) in domains(folder).items():
        rows = [{"text": name, "n": number} for number in range(samples)]
        written(Path(path), rows)
    mixed = module(folder).mixture()

    def drawn(dataset, workers=0, draws=DRAWS):
        loader = DataLoader(dataset, None, num_workers=workers)
        return counted((row["text"] for row in loader), draws)

    ranks = [split_dataset_by_node(mixed, rank, 2) for rank in range(2)]
    both = sum((collections.Counter(drawn(part, 0, 2000)) for part in ranks), collections.Counter())
    found = {"alone": drawn(mixed), "workers": drawn(mixed, 2), "ranks": dict(both)}
    rows = list(itertools.islice(mixed, 1800))
    list(zip(range(1500), mixed, strict=False))
    state = mixed.state_dict()
    resumed = module(folder).mixture()
    resumed.load_state_dict(state)
    same = [a == b for a, b in zip(rows[1500:], resumed, strict=False)]
    return found | {"resumed": {"same": sum(same)}}


def torchtitan(folder, rank):
    from torchtitan.hf_datasets.text_datasets import InterleavedHuggingFaceTextDataLoader

    names = list(domains(folder))
    for name, (path, samples) in domains(folder).items():
        words = " ".join([str(names.index(name))] * (BLOCK + 1))  # a document is a sequence
        Path(path).write_text((json.dumps({"text": words}) + "\n") * samples)
    config = module(folder).mixture()

    class Words:
        def encode(self, text, add_bos, add_eos):
            return [int(word) for word in text.split()]

    def loader(rank=0, ranks=1, workers=0):
        config.num_workers = workers
        place = {"dp_rank": rank, "dp_world_size": ranks}
        size = {"seq_len": BLOCK, "local_batch_size": 1}
        return InterleavedHuggingFaceTextDataLoader(config, tokenizer=Words(), **place, **size)

    def drawn(loader, draws=DRAWS):
        return counted((names[int(labels[0, 0])] for _, labels in loader), draws)

    ranks = [collections.Counter(drawn(loader(rank, 2), 2000)) for rank in range(2)]
    found = {"alone": drawn(loader()), "ranks": dict(ranks[0] + ranks[1])}
    found["workers"] = drawn(loader(workers=2))
    whole, begun, resumed = loader(), loader(), loader()
    whole = [labels[0].tolist() for _, labels in itertools.islice(whole, 1800)]
    list(itertools.islice(begun, 1500))
    resumed.load_state_dict(begun.state_dict())
    same = [a == b[0].tolist() for a, (_, b) in zip(whole[1500:], resumed, strict=False)]
    return found | {"resumed": {"same": sum(same)}}


def litdata(folder, rank):
    import torch
    from litdata import StreamingDataLoader, TokensLoader
    from litdata.streaming.cache import Cache

    names = list(domains(folder))
    if rank is None:
        for name, (path, samples) in domains(folder).items():
            cache = Cache(path, chunk_size=BLOCK * samples // 4, item_loader=TokensLoader(BLOCK))
            for sample in range(samples):  # its domain's number, and its own
                cache[sample] = torch.tensor([names.index(name), sample] + [0] * (BLOCK - 2))
            cache.done()
            cache.merge()
    mixture = module(folder).mixture

    def drawn(workers=0):
        loader = StreamingDataLoader(mixture(BLOCK), batch_size=1, num_workers=workers)
        return counted(names[int(batch[0][0])] for batch in loader)

    if rank is not None:
        return drawn()
    alone = counted(names[int(sample[0])] for sample in mixture(BLOCK))
    found = {"alone": alone, "loader": drawn(), "workers": drawn(2)}
    whole, begun, resumed = (
        StreamingDataLoader(mixture(BLOCK), batch_size=4, num_workers=0) for _ in range(3)
    )
    whole = [batch.tolist() for batch in itertools.islice(whole, 575)]
    list(itertools.islice(begun, 500))
    resumed.load_state_dict(begun.state_dict())
    same = [a == b.tolist() for a, b in zip(whole[500:], resumed, strict=False)]
    found["resumed"] = {"same": sum(same) * 4}
    return found | {"ranks": on_two_ranks("litdata", folder)}


def energon(folder, rank):
    import webdataset
    from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
    from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

    for name, (path, samples) in domains(folder).items():
        place = Path(path)
        place.mkdir()
        with webdataset.TarWriter(str(place / "0.tar")) as writer:
            for number in range(samples):
                writer.write({"__key__": f"{number}", "txt": f"{name}"})
        BaseWebdatasetFactory.prepare_dataset(
            place, ["0.tar"], split_parts_ratio=[("train", 1.0)], workers=1
        )
        kind = "sample_type: {__module__: megatron.energon, __class__: TextSample}"
        (place / ".nv-meta" / "dataset.yaml").write_text(f"{kind}\nfield_map: {{text: txt}}\n")

    def loader(rank=0, ranks=1, workers=0):
        place = WorkerConfig(rank=rank, world_size=ranks, num_workers=workers)
        dataset = get_train_dataset(
            folder / "mixture.yaml",
            worker_config=place,
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
        )
        return get_savable_loader(dataset)

    def drawn(loader, draws=DRAWS):
        return counted((sample.text for sample in loader), draws)

    ranks = [collections.Counter(drawn(loader(rank, 2), 2000)) for rank in range(2)]
    found = {"alone": drawn(loader()), "ranks": dict(ranks[0] + ranks[1])}
    found["workers"] = drawn(loader(workers=2))
    whole, begun, resumed = loader(), loader(), loader()
    keys = [sample.__key__ for sample in itertools.islice(whole, 1800)]
    list(itertools.islice(begun, 1500))
    resumed.restore_state_rank(begun.save_state_rank())
    same = [key == sample.__key__ for key, sample in zip(keys[1500:], resumed, strict=False)]
    return found | {"resumed": {"same": sum(same)}}


@contextlib.contextmanager
def leaves_of(package, *inner):
    """A package whose modules are imported without what it and `inner` packages import at once."""
    import importlib.util

    origin = Path(importlib.util.find_spec(package).origin).parent
    for name in (package, *(f"{package}.{part}" for part in inner)):
        module = types.ModuleType(name)
        module.__path__ = [str(origin.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    yield


def llama_factory(folder, rank):
    import yaml

    names = types.ModuleType("peft.utils")  # of files; the rest of it imports every model
    names.SAFETENSORS_WEIGHTS_NAME, names.WEIGHTS_NAME = "adapter.safetensors", "adapter.bin"
    sys.modules |= {"peft": types.ModuleType("peft"), "peft.utils": names}
    with leaves_of("llamafactory", "data", "extras", "hparams"):
        from llamafactory.data.data_utils import merge_dataset
        from llamafactory.data.parser import get_dataset_list
        from llamafactory.hparams.data_args import DataArguments
    from datasets import load_dataset

    files = {}
    for name, (path, samples) in domains(folder).items():
        place = Path(f"{path}.jsonl")
        place.write_text((json.dumps({"text": name}) + "\n") * samples)
        files[path] = {"file_name": str(place), "columns": {"prompt": "text"}}
    (folder / "dataset_info.json").write_text(json.dumps(files))

    def drawn(**more):
        config = yaml.safe_load((folder / "mixture.yaml").read_text())
        arguments = DataArguments(**config, dataset_dir=str(folder), **more)
        attributes = get_dataset_list(arguments.dataset, arguments.dataset_dir)
        assert len(attributes) == len(arguments.interleave_probs)
        rows = [
            load_dataset("json", data_files=at.dataset_name, split="train") for at in attributes
        ]
        if arguments.streaming:  # as its loader does, with one of dataloader_num_workers
            rows = [dataset.to_iterable_dataset(num_shards=1) for dataset in rows]
        return merge_dataset(rows, arguments, seed=0)

    return {
        "streamed": counted(row["text"] for row in drawn(streaming=True)),
    }


def maxtext(folder, rank):
    import grain.python as grain

    mixture = json.loads((folder / "mixture.json").read_text())
    for name, (path, samples) in domains(folder).items():
        Path(path).write_text(json.dumps([name] * samples))

    def mixed(host=0, hosts=1, epochs=None):
        """As its input pipeline does."""
        sources = {
            name: grain.MapDataset.source(json.loads(Path(config["path"]).read_text()))
            .shuffle(seed=0)
            .repeat(epochs)[host::hosts]
            .to_iter_dataset()
            for name, config in mixture.items()
        }
        weights = [float(config["weight"]) for config in mixture.values()]
        parts = [weight / sum(weights) for weight in weights]
        return grain.IterDataset.mix(sources, dict(zip(mixture, parts, strict=True)))

    ranks = [collections.Counter(counted(mixed(host, 2), 2000)) for host in range(2)]
    whole = list(itertools.islice(mixed(), 1800))
    begun, resumed = iter(mixed()), iter(mixed())
    list(itertools.islice(begun, 1500))
    resumed.set_state(begun.get_state())
    same = [a == b for a, b in zip(whole[1500:], resumed, strict=False)]
    once = counted(mixed(epochs=1))
    return {
        "alone": counted(mixed()),
        "ranks": dict(ranks[0] + ranks[1]),
        "resumed": {"same": sum(same)},
        "once": once,
    }


def olmo_core_composable(folder, rank):
    import numpy
    from olmo_core.data import TokenizerConfig
    from olmo_core.data.composable import ComposableDataLoader

    names = list(domains(folder))
    for name, (path, samples) in domains(folder).items():
        tokens = numpy.full((samples, BLOCK), 1 + names.index(name), numpy.uint8)
        tokens[:, -1] = 0  # a document is a sequence
        tokens.tofile(path)
    tokenizer = TokenizerConfig(vocab_size=100, eos_token_id=0, pad_token_id=99)
    config = module(folder).mixture(tokenizer, BLOCK, DRAWS * BLOCK)
    source = config.build(folder / "work")

    def loader(rank=0, ranks=1):
        made = ComposableDataLoader.Config(
            tokenizer=tokenizer, global_batch_size=2 * BLOCK, seed=0, work_dir=str(folder / "work"),
            display_source_visualization=False,
        ).build(source)  # fmt: skip
        made.dp_rank, made.dp_world_size = rank, ranks
        made.reshuffle(epoch=1)
        return made

    def drawn(loader):
        return counted(names[int(row[0]) - 1] for batch in loader for row in batch["input_ids"])

    ranks = [collections.Counter(drawn(loader(rank, 2))) for rank in range(2)]
    whole = [batch["input_ids"].tolist() for batch in loader()]
    begun, resumed = loader(), loader()
    list(itertools.islice(begun, 1500))
    resumed.load_state_dict(begun.state_dict())
    same = [a == b["input_ids"].tolist() for a, b in zip(whole[1500:1800], resumed, strict=False)]
    found = {"alone": drawn(loader()), "ranks": dict(ranks[0] + ranks[1])}
    return found | {"resumed": {"same": sum(same)}}


if __name__ == "__main__":
    made = globals()[sys.argv[1]](Path(sys.argv[2]), os.environ.get("RANK"))
    print(json.dumps(made))
