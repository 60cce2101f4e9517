"""The study of what a way is worth: its table, and the text that it makes scarce. Its runs take
hours."""

import json
from pathlib import Path

import zstandard

from benchmarks import worth


def test_the_table_is_of_paired_seeds() -> None:
    rows = [
        dict(zip(worth.COLUMNS, ("planted", wanted, way, seed, "9", of_it, mean, ""), strict=True))
        for wanted, way, seed, of_it, mean in (
            ("target", "swarm", "0", "2.0", "9"), ("target", "swarm", "1", "3.0", "9"),
            ("target", "natural", "0", "2.5", "1"), ("target", "natural", "1", "3.7", "1"),
            ("target", "natural", "2", "100", "1"), ("target", "uniform", "0", "1", "1"),
            ("mean", "natural", "0", "1", "4.0"),
        )
    ]  # fmt: skip
    *_, swarm, natural, uniform, mean = worth.table(rows).splitlines()
    assert swarm.startswith("| planted, target | swarm | 2 | 9 | 2.500 ± ") and "|  |" in swarm
    # 0.5 and 0.7: their mean, and Student's t of one degree of freedom times half of 0.2.
    assert natural.startswith("| planted, target | natural | 3 |")
    assert natural.endswith("| +0.600 ± 1.271 (2) |")
    assert uniform.endswith("| 1.000 |  |") and mean.endswith("| 4.000 |  |")


def test_what_counts_is_cut_and_nothing_else(tmp_path: Path) -> None:
    documents = [json.dumps({"text": "x" * 20_000, "id": n}) + "\n" for n in range(9)]
    for domain in ("python", "web"):
        for split in ("train", "validation"):
            path = tmp_path / "root" / domain / f"{split}-00000.jsonl.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zstandard.compress("".join(documents).encode()))
    folder = tmp_path / "folder"
    (given,) = worth.data("scarce", tmp_path / "root", folder)
    assert given == f"data.root={folder / 'scarce'}"
    left = {
        path.relative_to(folder / "scarce").as_posix(): zstandard.decompress(path.read_bytes())
        for path in folder.rglob("*.zst")
    }
    assert left.pop("python/train-00000.jsonl.zst").decode() == "".join(documents[:3])
    assert len(left) == 3 and {*left.values()} == {"".join(documents).encode()}
