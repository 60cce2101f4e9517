"""Classifiers that learn from generated and from real examples: models, fitting, figures."""
