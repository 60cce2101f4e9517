"""Our sampler in another trainer: which sequences of which domains a step trains on, while the
mixture changes, without torch.

Nothing but a step's number is asked for, so there is nothing to save: whatever process, worker or
restart asks for a step gets the same sequences, and every sequence of a domain comes once an epoch.

>>> import tempfile
>>> from doremi_train.client import Mixed, Stream
>>> folder = tempfile.mkdtemp()
>>> sizes = {"web": 1000, "code": 200}  # sequences
>>> stream = Stream(sizes, batch=8, mixture={"web": 0.75, "code": 0.25}, folder=folder)
>>> stream.draw(0).domain.tolist()
[0, 0, 1, 0, 0, 0, 1, 0]
>>> import numpy as np
>>> domains = {name: np.zeros((size, 16), np.int64) for name, size in sizes.items()}
>>> dataset = Mixed(domains, stream, steps=100)  # for a DataLoader without shuffling
>>> len(dataset), dataset[2]["domain"], dataset[2]["input_ids"].shape
(800, 1, (16,))

The others import torch: `learned` lets the mixture follow from losses, `proxy` is DoReMi's,
`loader` has a state; `hugging_face`, `torchtitan` and `lightning` have them in those trainers.
"""

from doremi_train.client.mixed import Mixed
from doremi_train.client.stream import Stream

__all__ = ["Mixed", "Stream"]
