#!/usr/bin/env bash
# What parquet calls the uncompressed size of a row group may be a hundredth of its text.
#
# Versions: pyarrow 26.0.1. Seen 2026-11-30.
# A good guess: total_byte_size and total_uncompressed_size tell how much memory the rows take, so a
# reader that divides them by num_rows knows how many rows fit into a batch.
# What it does: they count encoded bytes. Of texts that repeat, as documents of a corpus with copies,
# each stands once in a dictionary, and a row is an index of some bits. Whoever sizes a batch by that
# number holds all of the text at once.
# Fails if this changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q pyarrow==26.0.1
cd "$work"
"$work/env/bin/python" - <<'PYTHON'
import pyarrow as pa
import pyarrow.parquet as pq

text = "a document of which there are many copies " * 50
pq.write_table(pa.table({"text": [text] * 1024}), "copies.parquet", compression="none")
with pq.ParquetFile("copies.parquet") as file:
    group = file.metadata.row_group(0)
    said = {
        "total_byte_size": group.total_byte_size,
        "total_uncompressed_size": group.column(0).total_uncompressed_size,
    }
    held = next(file.iter_batches(1024)).nbytes
print(said, "and a batch of its rows:", held)
assert held > 1024 * len(text) > 100 * max(said.values())
PYTHON
