"""How the C library hands out memory: freed blocks can be kept for the next step, and lie in huge pages."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes  # elsewhere only in a process that asks for it

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of the GNU C library

KEEPING = {
    M_MMAP_MAX: 0,  # no block is mapped by itself, to be unmapped when it is freed
    M_TRIM_THRESHOLD: -1,  # the end of the heap is never given back
    M_TOP_PAD: 16 * 2**20,  # bytes that the heap grows by beyond what is asked for; untouched, they cost nothing
}


MADV_HUGEPAGE = 14  # madvise(2) of Linux, on every architecture

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Whether the kernel hands out huge pages: always, where a process asks for them by madvise, or never."""

HUGE_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
"""Bytes of a huge page: 2 MiB on most machines, 512 MiB on ARM with small pages of 64 KiB."""

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
"""Whether the kernel promises more memory than there is: 2 for never."""


def keep_freed_memory(*, huge_pages: bool = True) -> bool:
    """Let this process, which must be one's own, reuse the memory it frees instead of returning it to the system.

    The GNU C library maps every block above 32 MiB by itself and unmaps it when it is freed, so that each activation of
    each training step or prediction on a CPU is made of new pages, which the kernel has to clear one by one. Kept,
    they are there.
    In return the process holds on to the most memory it has ever used, until it ends, and that is more than it would
    have been, since small blocks come to lie between large ones. Parameters and values: manual page mallopt(3).

    Args:
        huge_pages: also ask the kernel for pages of 2 MiB instead of 4 KiB, for up to half of the machine's memory
            and 64 GiB: a processor remembers where some thousand pages are, and reads ahead within one. Addresses that
            are not used take no memory, only that arrays of zeros (`numpy.zeros`) are cleared, and so taken, at once.
            See `gives_huge_pages`.

    Returns:
        Whether freed memory is kept. Nothing is done on other systems and C libraries (musl, macOS, Windows), nor where
        the user has arranged the allocation: by a variable `MALLOC_…`, by `glibc.malloc` in `GLIBC_TUNABLES`, or by an
        allocator in `LD_PRELOAD`.
    """
    if sys.platform != "linux" or arranged_by_user(os.environ):
        return False
    import ctypes

    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt")):
        return False
    done = [libc.mallopt(parameter, value) for parameter, value in KEEPING.items()]
    if 0 in done:
        return False
    if huge_pages and gives_huge_pages():
        _lay_heap_in_huge_pages(libc)
    return True


def gives_huge_pages() -> bool:
    """Whether `keep_freed_memory` asks for huge pages: they are to be had for the asking, and address space is free.

    They are not asked for where they come by themselves, where they are larger than 2 MiB, where memory is promised
    strictly (sysctl `vm.overcommit_memory` 2), and where this process may not have all the addresses it likes
    (`ulimit -v`, `ulimit -d`).
    """
    try:
        on_demand = "[madvise]" in HUGE_PAGES.read_text(encoding="ascii")
        small = int(HUGE_PAGE.read_text(encoding="ascii")) <= 2 * 2**20
        strict = OVERCOMMIT.read_text(encoding="ascii").strip() == "2"
    except OSError:
        return False
    import resource  # not on Windows

    limits = [resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return on_demand and small and not strict and all(limit == resource.RLIM_INFINITY for limit in limits)


def _lay_heap_in_huge_pages(libc: "ctypes.CDLL") -> None:
    """Grow the heap at once, without touching it, and mark its addresses; they stay when the block is freed."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    size = min(os.sysconf("SC_PHYS_PAGES") // 2 * page, 64 * 2**30)
    try:
        # Were malloc refused, it would leave the heap for good, and nothing be kept.
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:
        return
    start = -(-block // page) * page
    libc.madvise(start, (block + size) // page * page - start, MADV_HUGEPAGE)
    libc.free(block)


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
