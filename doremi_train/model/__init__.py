"""A causal language model: its configuration, its folder, its losses per token, its optimiser and
its costs."""
