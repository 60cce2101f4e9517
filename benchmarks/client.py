"""What drawing from a changing mixture costs in another trainer: our stream's draws over those of
other libraries' mixing samplers on the same weights, and a draw over a training step of `tiny`.

All sides say of which domain a row is, and which it is, as numbers of Python; no row is read.
`steady` is ours where the mixture stays, as it does in the others, and `arrays` that without
listing what was drawn. torch's is no mixture: one index over all rows, with replacement, so rows
are none of an epoch's, and each epoch of it is as many draws at once. Draws are compared in CPU
seconds; that a block's file waits for the disk is in the part of a step.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from doremi_train.client import Stream
from doremi_train.config import conf_dir
from doremi_train.files import write_json
from doremi_train.model import folders

DOMAINS, ROWS, BATCH, EVERY = 17, 100_000, 256, 100
_ENDLESS = 1 << 24  # steps, more than are drawn here
VOCABULARY, SEQUENCES, LENGTH = 1024, 32, 128  # of a step of tiny


def weights() -> list[float]:
    return np.random.default_rng(0).dirichlet(np.full(DOMAINS, 0.5)).tolist()


def ours(folder: Path, every: int = EVERY, listed: bool = True) -> Callable[[int], object]:
    """A stream whose file is read again every so many steps."""
    names = [f"domain-{n}" for n in range(DOMAINS)]
    file = folder / "mixture.json"
    write_json(file, dict(zip(names, weights(), strict=True)))
    stream = Stream(dict.fromkeys(names, ROWS), BATCH, file, folder / f"every-{every}", every)
    steps = itertools.count()

    def draw(rows: int) -> None:
        for _ in range(-(-rows // BATCH)):
            drawn = stream.draw(next(steps))
            if listed:
                for _ in zip(drawn.domain.tolist(), drawn.sequence.tolist(), strict=True):
                    pass

    return draw


def random_mix() -> Callable[[int], object]:
    """webdataset's RandomMix over endless sources."""
    from webdataset import RandomMix

    def rows(domain: int) -> Iterator[tuple[int, int]]:
        return ((domain, row % ROWS) for row in itertools.count())

    mixed = iter(RandomMix([rows(n) for n in range(DOMAINS)], probs=weights(), longest=True))
    return lambda count: sum(1 for _ in itertools.islice(mixed, count))


def interleaved() -> Callable[[int], object]:
    """datasets' interleave_datasets over endless iterable datasets."""
    import datasets

    def rows(domain: int) -> Iterator[dict[str, int]]:
        return ({"domain": domain, "row": row % ROWS} for row in itertools.count())

    sources = [
        datasets.IterableDataset.from_generator(rows, gen_kwargs={"domain": n})
        for n in range(DOMAINS)
    ]
    mixed = iter(datasets.interleave_datasets(sources, probabilities=weights(), seed=0))
    return lambda count: sum(1 for _ in itertools.islice(mixed, count))


def weighted() -> Callable[[int], object]:
    """torch's WeightedRandomSampler over all rows, an epoch of it as long as what is asked for."""
    # A list, as the sampler's annotation asks, would be made a tensor again in every round.
    each: Any = torch.tensor(weights(), dtype=torch.float64).repeat_interleave(ROWS) / ROWS

    def draw(count: int) -> None:
        sampler = torch.utils.data.WeightedRandomSampler(each, count)
        for index in sampler:
            divmod(index, ROWS)

    return draw


def training() -> Callable[[], object]:
    """A step of tiny as one would write it."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / "tiny.yaml"))
    assert isinstance(config, dict)
    model = folders.build({**config["config"], "vocab_size": VOCABULARY}, 0).inner
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1))

    def step() -> None:
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def draw_of_one(stream: Callable[[int], object]) -> float:
    """Seconds of a step's draw, on average over a block and its file."""
    began = time.perf_counter()
    stream(EVERY * BATCH)
    return (time.perf_counter() - began) / EVERY


def measure(given: argparse.Namespace) -> common.Result:
    torch.set_num_threads(1)
    count, rounds = (2_000, 3) if given.quick else (50_000, 9)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stream = ours(folder)
        draws = {
            "webdataset": random_mix(),
            "datasets": interleaved(),
            "torch_weighted": weighted(),
            "ours": stream,
            "steady": ours(folder, _ENDLESS),
            "arrays": ours(folder, _ENDLESS, listed=False),
        }
        sides: dict[str, Callable[[], object]] = {n: partial(d, count) for n, d in draws.items()}
        times = common.alternate(sides, rounds, clock=time.process_time)
        own = ("ours", "steady", "arrays")
        ratios = {
            f"{name}_over_{side}": common.ratio(times[name], times[side])
            for side in own
            for name in draws
            if name not in own
        }
        sides = {"draw": lambda: draw_of_one(stream), "step": training()}
        both = common.alternate(sides, 5 if given.quick else 40)
        ratios["draw_over_step"] = common.ratio(both["draw"], both["step"])
    per_second = {name: count / min(seconds) for name, seconds in times.items()}
    return common.Result(ratios, {"draws_per_second": per_second})


if __name__ == "__main__":
    common.main("client", __doc__, measure)
