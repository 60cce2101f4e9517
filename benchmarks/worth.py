"""What a way to a mixture is worth where something counts: final runs that are larger and longer
than the small ones, every way with as many FLOPs in all as the swarm takes, paired over seeds.

    python -m benchmarks.worth train --bed planted --way swarm --seeds 0 1 2 3 4 5 --folder runs
    python -m benchmarks.worth table

`train` makes the runs that `worth.csv` beside this file has not, one after another, and adds a line
of each; a bed and a way may be trained on several machines, and the lines brought together. `table`
prints what the lines say, with Student's interval over the seeds that both sides have.
"""

import argparse
import csv
import datetime
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import zstandard

from doremi_train.evaluation import statistics
from doremi_train.files import read_json, write_bytes

FIGURES = Path(__file__).with_suffix(".csv")
COLUMNS = ("bed", "objective", "way", "seed", "steps", "target", "mean", "date")
STEPS = 1600  # of the final run on a swarm's mixture
CUT = 70_000  # bytes of a scarce domain
# The swarm and the final run of all beds; experiment=compare sets the rest of the small runs.
SHARED = ("experiment=compare", "stage=main", "main.comparisons=[]", "main.model=tiny")
# The domains that count, and the data; `--root` is a folder of a folder a domain.
BEDS = {
    "planted": ("hard", "related_a"),
    "debpile": ("python", "perl_docs"),
    "scarce": ("python", "perl_docs"),  # the same text, these two cut to CUT bytes each
}
_SWARM = (
    "mixture=swarm", "swarm.design=optimal", "swarm.runs=16", "swarm.reuse=false",
    "proxy.match_repetition=true",
)  # fmt: skip
WAYS = {
    "swarm": (*_SWARM, "swarm.regressor=saturating"),
    "swarm-log_linear": (*_SWARM, "swarm.regressor=log_linear"),
    "swarm-gaussian_process": (*_SWARM, "swarm.regressor=gaussian_process"),
    "swarm-corrected": (*_SWARM, "swarm.regressor=corrected"),
    "natural": ("mixture=natural",),
    "uniform": ("mixture=uniform",),  # within mixture.max_epochs, as all are but a swarm's
    "uniform-any": ("mixture=uniform", "mixture.max_epochs=1000"),
    "unimax": ("mixture=unimax",),
    "target": ("mixture=target",),
    "doremi": ("mixture=doremi_auto",),
    "doge": ("mixture=doge",),
    "mixmin": ("mixture=mixmin",),
}


def data(bed: str, root: Path | None, folder: Path) -> list[str]:
    """Overrides that name a bed's text."""
    if bed == "planted":
        return ["data=planted"]
    if root is None:
        sys.exit(f"--bed {bed}: give --root, a folder of real text with {', '.join(BEDS[bed])}")
    return [f"data.root={_scarce(root, folder / 'scarce') if bed == 'scarce' else root}"]


def _scarce(root: Path, target: Path) -> Path:
    """The same text, the domains that count cut to their first documents."""
    for path in sorted(root.glob("*/*.jsonl.zst")):
        lines = path.read_bytes()
        if path.parent.name in BEDS["scarce"] and path.name.startswith("train"):
            kept, left = b"", CUT
            text = io.BytesIO(zstandard.decompress(lines, max_output_size=1 << 30))
            for line in text:
                size = len(json.loads(line)["text"].encode())
                if size <= left:
                    kept, left = kept + line, left - size
                elif left < CUT / 7:
                    break
            lines = zstandard.compress(kept)
        to = target / path.parent.name / path.name
        to.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(to, lines)
    return target


def objective(bed: str, name: str) -> list[str]:
    return [f"objective={name}", f"target.domains=[{','.join(BEDS[bed])}]"]


# ── Runs ────────────────────────────────────────────────────────────────────────────


def command(*overrides: str) -> None:
    done = subprocess.run([sys.executable, "-m", "doremi_train", *overrides], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def steps(bed: list[str], way: str, folder: Path) -> int:
    """Of the final run of a way, so that all in all it takes as many FLOPs as the swarm."""
    runs: dict[str, Any] = {}
    for name in ("swarm", way):
        asked = [*SHARED, *bed, *WAYS[name], f"main.steps={STEPS}", "stage=plan", "seed=0"]
        where = folder / "plans" / f"{name}-{len(runs)}"
        command(*asked, f"run_dir={where}", f"store={folder / 'nothing'}")
        runs[name] = read_json(where / "plan.json")["stages"].values()
    final = next(run["flops"] for run in runs[way] if run["kind"] == "main")
    small, others = (
        sum(run["flops"] for run in runs[name] if run["kind"] != "main") for name in ("swarm", way)
    )
    return STEPS + int((small - others) / (final / STEPS) + 1e-6)


def train(
    bed: str, wanted: str, way: str, seeds: list[int], given: list[str], folder: Path
) -> None:
    """Add a line for every seed that has none."""
    known = {tuple(line[key] for key in COLUMNS[:4]) for line in lines()}
    given = [*given, *objective(bed, wanted)]
    long = steps(given, way, folder / bed / wanted / way)
    for seed in seeds:
        if (bed, wanted, way, str(seed)) in known:
            continue
        run_dir = folder / bed / wanted / way / str(seed)
        asked = [*SHARED, *given, *WAYS[way], f"main.steps={long}", f"seed={seed}"]
        command(*asked, f"store={folder / 'store'}", f"run_dir={run_dir}")
        figures = read_json(run_dir / "main" / "result.json")["evaluation"]
        losses = [figures["domains"][name]["loss"] for name in BEDS[bed]]
        today = datetime.date.today().isoformat()
        row = (bed, wanted, way, seed, long, sum(losses) / len(losses), figures["mean_loss"], today)
        with FIGURES.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


# ── The table ───────────────────────────────────────────────────────────────────────


def lines() -> list[dict[str, str]]:
    if not FIGURES.exists():
        write_bytes(FIGURES, (",".join(COLUMNS) + "\n").encode())
    with FIGURES.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: what each way reached, and what a swarm gains over it, + where that is better."""
    head = ("bed, objective", "way", "seeds", "steps", "reached", "a swarm's gain (seeds)")
    said = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    reached: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        ways = reached.setdefault((row["bed"], row["objective"]), {})
        counts = row["target"] if row["objective"] == "target" else row["mean"]
        ways.setdefault(row["way"], {})[int(row["seed"])] = float(counts)
    took: dict[Any, str] = {(r["bed"], r["objective"], r["way"]): r["steps"] for r in rows}
    for (bed, wanted), ways in reached.items():
        for way, losses in ways.items():
            swarm = ways.get("swarm", {})
            both = sorted(losses.keys() & swarm.keys()) if way != "swarm" else []
            told = ""
            if len(both) > 1:
                gain = statistics.paired([losses[s] for s in both], [swarm[s] for s in both])
                told = f"{gain.mean:+.3f} ± {gain.half:.3f} ({len(both)})"
            mean = statistics.spread([*losses.values()], 3)
            cells = (f"{bed}, {wanted}", way, len(losses), took[bed, wanted, way], mean, told)
            said.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worth", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    trained = actions.add_parser("train")
    trained.add_argument("--bed", choices=BEDS, required=True)
    trained.add_argument("--objective", choices=("target", "mean"), default="target")
    trained.add_argument("--way", choices=WAYS, required=True)
    trained.add_argument("--seeds", type=int, nargs="+", default=[*range(6)])
    trained.add_argument("--root", type=Path)
    trained.add_argument("--folder", type=Path, required=True)
    actions.add_parser("table")
    asked = parser.parse_args()
    if asked.action == "table":
        print(table(lines()))
        return
    folder = asked.folder.resolve()
    given = data(asked.bed, asked.root and asked.root.resolve(), folder)
    train(asked.bed, asked.objective, asked.way, asked.seeds, given, folder)


if __name__ == "__main__":
    main()
