"""What is worth training on: documents of a corpus, and examples for fine-tuning."""
