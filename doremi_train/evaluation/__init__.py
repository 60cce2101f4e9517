"""What a trained model is worth: losses, downstream tasks, statistics over seeds, and detectors."""
