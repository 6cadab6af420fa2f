"""Memory that a CPU program frees stays with the process, instead of going back to the kernel after every call.

A compiled program allocates its temporaries anew in each call. glibc hands blocks of that size back to the kernel at
once, so every call pays for fresh pages: two fifths of a lone training step of a small ViT. The settings below are read
when a process starts, hence the command line starts itself again with them; a program that uses the library sets
``GLIBC_TUNABLES`` in its environment.
"""

from __future__ import annotations

import os
import platform
import sys

TUNABLES = {
    "mmap_max": 0,  # no block of its own for a large array, which would be unmapped when freed,
    "trim_threshold": 2**40,  # and nothing is given back from the end of the heap
    "arena_max": 1,  # all threads use the one heap of which this holds
    "top_pad": 2**28,  # bytes: the heap grows in large steps,
    "hugetlb": 1,  # in pages of 2 MiB where the kernel has them
}


def settle() -> None:
    """Start this process again with glibc's allocator tuned, unless it is already, or is not glibc's."""
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ or not sys.orig_argv:
        return
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": tunables})
