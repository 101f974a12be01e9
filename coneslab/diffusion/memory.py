"""Memory that a CPU would be given and would give back a thousand times a second."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt(3)
_KEPT, _LARGEST, _PAD = 2**31 - 1, 256 << 20, 64 << 20  # bytes


def keep_memory() -> bool:
    """Let this process keep the memory that tensors leave, for those that come next; whether it can.

    glibc returns large blocks to the kernel once they are free, and requests them again for the next tensor, page by
    page. In the main thread that costs an eighth of the time of drawing and training on two cores, in other threads
    half. What is kept goes back when the process ends; blocks above 256 MB still go at once.
    Other allocators (macOS, Windows, musl) are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return False
    wanted = (_TRIM_THRESHOLD, _KEPT), (_MMAP_THRESHOLD, _LARGEST), (_TOP_PAD, _PAD)
    return all(bool(mallopt(parameter, size)) for parameter, size in wanted)
