"""A process's part of a stream's batches, and where it goes on."""

from pathlib import Path
from typing import Any

import pytest

from doremi_train.client import Mixed, Stream
from doremi_train.client.loader import Loader
from doremi_train.client.proxy import Reweighting
from doremi_train.config import UserError

SIZES, BATCH, STEPS = {"a": 30, "b": 50}, 12, 6


def mixed(folder: Path) -> Mixed:
    stream = Stream(SIZES, BATCH, {"a": 0.3, "b": 0.7}, folder / "stream", every=2)
    domains = {name: [{"row": (name, n)} for n in range(size)] for name, size in SIZES.items()}
    return Mixed(domains, stream, STEPS)


def read(loader: Loader, most: int = 1000) -> list[list[Any]]:
    return [micro for _, micro in zip(range(most), loader, strict=False)]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_together_read_the_batches(workers: int, tmp_path: Path) -> None:
    whole = mixed(tmp_path)
    more = {"collate_fn": list, "num_workers": workers}
    parts = [read(Loader(whole, 2, rank, 3, **more)) for rank in range(3)]
    assert [len(part) for part in parts] == [len(Loader(whole, 2, 0, 3))] * 3
    found = [row for together in zip(*parts, strict=True) for micro in together for row in micro]
    assert found == [whole[n] for n in range(BATCH * STEPS)]


def test_it_goes_on_where_it_was_with_as_many_processes_as_there_are(tmp_path: Path) -> None:
    whole = mixed(tmp_path)
    first = Loader(whole, 4, collate_fn=list, num_workers=1)
    begun = read(first, 5)  # the worker is ahead of it
    assert len(begun) == 5 and first.state_dict() == {"rows": 5 * 4}
    after = [Loader(whole, 2, rank, 2, collate_fn=list) for rank in range(2)]
    for loader in after:
        loader.load_state_dict(first.state_dict())
    rest = [micro for both in zip(*map(read, after), strict=True) for micro in both]
    rows = [row for micro in begun + rest for row in micro]
    assert rows == [whole[n] for n in range(BATCH * STEPS)]
    assert after[0].state_dict() == {"rows": 0}  # another pass begins anew
    with pytest.raises(UserError, match="5 rows were read.*resume with as many as before"):
        after[0].load_state_dict({"rows": 5})


@pytest.mark.parametrize(("rows", "size"), [(5, 1), (4, 2), (0, 1)])
def test_rows_that_do_not_divide_the_batch_are_refused(
    rows: int, size: int, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"Loader: rows={rows}: .* make it so"):
        Loader(mixed(tmp_path), rows, 0, size)


def test_a_trainer_that_reads_another_batch_is_refused(tmp_path: Path) -> None:
    loader = Loader(mixed(tmp_path), 2, 0, 3)
    loader.check(3, 2)
    for processes, micro_batches, read in ((3, 1, 6), (1, 2, 4)):
        with pytest.raises(UserError, match=f"reads {read} rows, the stream's has 12"):
            loader.check(processes, micro_batches)
    with pytest.raises(UserError, match="micro_batches=2: the trainer's steps have 1"):
        Reweighting(mixed(tmp_path).stream, STEPS, micro_batches=2).check(1)
