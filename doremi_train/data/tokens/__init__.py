"""Text becomes token shards: tokeniser, encoding, writing and reading."""
