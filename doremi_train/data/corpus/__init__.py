"""Text as it is found: which files, how they are opened, and the documents in them."""
