"""Selection of examples for fine-tuning: gradient influence, its rows on disk, and baselines."""
