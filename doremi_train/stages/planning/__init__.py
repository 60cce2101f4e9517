"""What would run, at what cost, and what is wrong with it, before anything does."""
