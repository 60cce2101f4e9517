"""Everything that only a GPU can tell, in one command: `python -m benchmarks.gpu --minutes 8`; on a
CPU at a reduced size, so that it works when a GPU is there: `--rehearse`.

A part is a module here, and a process of its own with its own time limit. What it finds stands in
one file of JSON lines as soon as it is found (`record`), so a part that fails or is stopped loses
no more than what it had not found yet.
"""
