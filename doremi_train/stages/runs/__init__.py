"""The runs that stages share: language models, the reference and its losses, targets, and children
as jobs."""
