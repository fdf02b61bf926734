"""Memory of the process on CPU."""

import ctypes
import platform

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """From now on what is freed stays with the process, for the next step, which needs as much.

    glibc gives large blocks back to the system at once, and every step asks for them anew and pays
    for each of their pages. The most that is held at one time does not change. Of no effect
    elsewhere than with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_ARENA_MAX, 1)  # the others could not hold large blocks
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
