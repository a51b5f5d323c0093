"""How the C library hands out memory: freed blocks can be kept for the next training step."""

import os
import sys
from collections.abc import Mapping
from pathlib import PurePath

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of the GNU C library

KEEPING = {
    M_MMAP_MAX: 0,  # no block is mapped by itself, to be unmapped when it is freed
    M_TRIM_THRESHOLD: -1,  # the end of the heap is never given back
    M_TOP_PAD: 16 * 2**20,  # bytes that the heap grows by beyond what is asked for; untouched, they cost nothing
}


def keep_freed_memory() -> bool:
    """Let this process, which must be one's own, reuse the memory it frees instead of returning it to the system.

    The GNU C library maps every block above 32 MiB by itself and unmaps it when it is freed, so that each activation of
    each training step on a CPU is made of new pages, which the kernel has to clear one by one. Kept, they are there.
    In return the process holds on to the most memory it has ever used, until it ends, and that is more than it would
    have been, since small blocks come to lie between large ones. Parameters and values: manual page mallopt(3).

    Returns:
        Whether it took effect. Nothing is done on other systems and C libraries (musl, macOS, Windows), nor where the
        user has arranged the allocation: by a variable `MALLOC_…`, by `glibc.malloc` in `GLIBC_TUNABLES`, or by an
        allocator in `LD_PRELOAD`.
    """
    if sys.platform != "linux" or arranged_by_user(os.environ):
        return False
    import ctypes

    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt")):
        return False
    done = [libc.mallopt(parameter, value) for parameter, value in KEEPING.items()]
    return 0 not in done


def arranged_by_user(environment: Mapping[str, str]) -> bool:
    """Whether environment variables say how memory is to be allocated, or by what.

    Args:
        environment: names and values, such as `os.environ`.
    """
    preloaded = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    return (
        any(name.startswith("MALLOC_") for name in environment)
        or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
        or any("malloc" in PurePath(library).name for library in preloaded)  # jemalloc, tcmalloc, mimalloc, …
    )
