"""Text becomes batches: sources, tokeniser, token shards, counter-based sampler."""
