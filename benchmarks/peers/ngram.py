"""The package data-selection on the text that `benchmarks.ngram` laid out, run by an interpreter
that has it.

Answers each line it reads with the processor seconds, all processes together, of estimating the
weights' parameters on all of raw.jsonl and computing all weights, in one process.
"""

import contextlib
import os
import shutil
import sys

from data_selection import HashedNgramDSIR

for _ in sys.stdin:
    shutil.rmtree("cache", ignore_errors=True)
    with contextlib.redirect_stdout(sys.stderr):
        peer = HashedNgramDSIR(["raw.jsonl"], ["target.jsonl"], "cache", num_proc=1)
        began = os.times()
        peer.fit_importance_estimator(num_tokens_to_fit="all")
        peer.compute_importance_weights()
        ended = os.times()
    print(sum(ended[:4]) - sum(began[:4]), flush=True)
