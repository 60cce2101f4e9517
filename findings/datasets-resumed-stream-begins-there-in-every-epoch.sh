#!/usr/bin/env bash
# A stream of Hugging Face datasets that was resumed begins at the resumed row in every epoch.
#
# Versions: datasets 5.2.0. Seen 2026-11-30.
# A good guess: load_state_dict puts the stream back where a run stopped; the epoch that was begun is
# finished, and the next `for row in stream` begins at the first row, as it does without a resume.
# What it does: the state stays, and every later pass begins at that row again. The rows before it
# are never seen, and a state that was saved at the end of a pass makes all later ones empty, over
# which "repeat until there are enough" loops without end. `set_epoch` with another number drops the
# state.
# Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q datasets==5.2.0
cd "$work"
HF_HOME="$work/cache" "$work/env/bin/python" - <<'PYTHON'
import json

from datasets import load_dataset

with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps({"n": number}) + "\n" for number in range(40))


def stream():
    return load_dataset("json", data_files="rows.jsonl", split="train", streaming=True)


def state_after(rows):
    begun = stream()
    for _ in zip(range(rows), begun):
        pass
    return begun.state_dict()


def passes(state, epochs=3, told=False):
    resumed = stream()
    if state:
        resumed.load_state_dict(state)
    found = []
    for epoch in range(epochs):
        if told:
            resumed.set_epoch(epoch)
        found.append(len([row["n"] for row in resumed]))
    return found


fresh, middle, end = passes(None), passes(state_after(30)), passes(state_after(40))
told = passes(state_after(30), told=True)
print("rows of three passes over 40:")
print("  not resumed                  ", fresh)
print("  resumed after row 30         ", middle)
print("  the same, with set_epoch     ", told)
print("  resumed after the last row   ", end)
assert fresh == [40, 40, 40]
assert middle == [10, 10, 10]
assert told == [10, 40, 40]
assert end == [0, 0, 0]
PYTHON
