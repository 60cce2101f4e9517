"""From text to batches: sources, tokeniser, token shards, counter-based sampler."""
