"""From text to token shards: tokeniser, encoding, writing and reading."""
