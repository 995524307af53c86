"""Memory that a training process keeps instead of handing it back to the kernel at every step.

glibc returns large blocks at once. A step on a CPU makes and frees activations of many megabytes,
so each step pays anew for the kernel to clear and map them.
"""

import ctypes
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT = 1 << 30  # bytes


@cache
def keep() -> bool:
    """Ask glibc to keep freed memory in this process; False where there is no glibc.

    Only time changes, no result; the process's memory stays at its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return all(mallopt(name, KEPT) for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
