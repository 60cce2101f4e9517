"""How much should each piece of training data count? See README.md; the algorithms are in
`doremi_train.methods`."""

__version__ = "0.1.0"
