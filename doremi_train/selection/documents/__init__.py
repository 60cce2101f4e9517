"""Document selection over a corpus of any size: the plumbing around `methods.ngram` and its
baselines.

sources → batches of documents → words (cut into parts, find copies) → a scorer
        → scores of every part → digits of keys, summed → where each budget ends
        → sidecar, diagnostics, shards
"""
