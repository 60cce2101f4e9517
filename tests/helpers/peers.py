"""Run by the interpreter of DOREMI_PEERS, without our packages: real trainers' loaders on what was
exported.

`peers.py FOLDER` reads the exported files there and prints one JSON line: what was parsed, and for
loaders that run here the part of all drawn tokens that came from the domain `short` (10 tokens a
document; `long`: 40).
"""

import contextlib
import json
import runpy
import sys
import types
from pathlib import Path

import yaml

LENGTHS = {"short": 10, "long": 40}
BLOCK = 8  # tokens of a sequence


def blends(folder):
    from megatron.core.datasets.utils import get_blend_from_list

    return {
        "megatron": get_blend_from_list(
            (folder / "megatron.txt").read_text().split()
        ),  # as for --data-args-path
        "nemo": get_blend_from_list(json.loads((folder / "nemo.json").read_text())),
    }


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


def mosaicml_streaming(folder):
    with without_pictures():
        from streaming import MDSWriter, Stream, StreamingDataset

    for name in LENGTHS:
        with MDSWriter(out=str(folder / name), columns={"domain": "str"}) as writer:
            for _ in range(400):
                writer.write({"domain": name})
    streams = yaml.safe_load((folder / "mosaicml_streaming.yaml").read_text())["streams"]
    made = [
        Stream(**fields, local=str(folder / "cache" / name)) for name, fields in streams.items()
    ]
    dataset = StreamingDataset(streams=made, batch_size=1, epoch_size=1000)
    drawn = [sample["domain"] for sample in dataset]
    return {
        "mosaicml_streaming proportions": [stream.proportion for stream in made],
        "mosaicml_streaming": drawn.count("short") / len(drawn),
    }


def datasets(folder):
    from datasets import Dataset

    def opened(path):
        name = Path(path).name
        return Dataset.from_dict({"tokens": [[name] * LENGTHS[name]] * 4000})

    mixed = runpy.run_path(str(folder / "datasets.py"), run_name="exported")["mixture"](
        open_source=opened
    )
    tokens = [token for row in mixed.select(range(4000))["tokens"] for token in row]
    return {"datasets": tokens.count("short") / len(tokens)}


def blocks(number):
    """A million tokens' worth of one domain, each token its number."""
    import torch

    yield torch.full((BLOCK * 2000,), number, dtype=torch.int)


def litdata(folder):
    from litdata import TokensLoader, optimize

    for number, name in enumerate(LENGTHS):
        out = folder / "lit" / name
        optimize(
            blocks,
            [number],
            str(out),
            chunk_size=BLOCK * 2000,
            num_workers=1,
            item_loader=TokensLoader(BLOCK),
        )
        (folder / name).rename(folder / f"{name}_mds")  # the place is another target's
        out.rename(folder / name)
    mixed = runpy.run_path(str(folder / "litdata.py"), run_name="exported")["mixture"](BLOCK)
    drawn = []
    for sample in mixed:
        drawn.append(int(sample[0]))
        if len(drawn) == 1500:
            break
    return {"litdata": drawn.count(0) / len(drawn)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = blends(folder) | mosaicml_streaming(folder) | datasets(folder) | litdata(folder)
    print(json.dumps(found))
