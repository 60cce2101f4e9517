"""Memory that malloc gives back. Layers that are gathered and dropped again leave holes among what
is kept, and glibc keeps these: as much as a third of a process that trains a divided model."""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt
_LARGE = 1 << 20  # bytes


def give_back() -> None:
    """Ask the system itself for each large piece of memory from now on, which goes back to it when
    it is dropped; where the C library is another than glibc nothing changes. Left to itself glibc
    does so too, but raises what counts as large to 32 MB. It costs the time of clearing memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
