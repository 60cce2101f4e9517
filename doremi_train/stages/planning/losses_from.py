"""Where the reference's losses come from at the least cost: computed with every batch by a model
that is whole on each process or divided among them, or cached.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Way(NamedTuple):
    """A way, and what it takes of the proxies that are left."""

    name: str
    keys: str  # that ask for it
    memory: int  # bytes of a process where it computes, at the most
    sequences: int  # that the reference is run on, over all processes
    gathered: int  # bytes that a process gets from others for it
    disk: int  # bytes


def cheapest(ways: Sequence[Way], room: float | None) -> Way | None:
    """The one that runs the reference on fewest sequences, then moves fewest bytes between
    processes, then to disk, of those that fit into `room` bytes (None: all do); None where none
    does."""
    fit = [way for way in ways if room is None or way.memory <= room]
    return min(fit, key=lambda way: (way.sequences, way.gathered, way.disk), default=None)
