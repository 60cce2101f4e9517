"""How fast it is, as ratios that are measured side by side: `python -m benchmarks`, `python -m
benchmarks.NAME`."""
