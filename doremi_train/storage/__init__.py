"""What lies on disk or far away: runs, checkpoints, and remote files that are read steadily."""
