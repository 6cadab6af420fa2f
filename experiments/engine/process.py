"""How the command line runs its own process: memory is kept, compiled programs are found again, a CPU can be several.

A compiled program allocates its temporaries anew in each call. glibc hands blocks of that size back to the kernel at
once, so every call pays for fresh pages, a large part of a lone training step of a small ViT. Its settings are read
when a process starts, hence the command line starts itself again with them; a program that uses the library sets
``GLIBC_TUNABLES`` in its environment. What is already in the environment stays.

A CPU counts as one device, whose cores share every operation; as several, each of which computes clients of its own.

On a GPU temporaries are the device's, and one heap for all threads only holds up the many that compile; what takes the
time there is trying Triton's kernels for every matrix product, which gain a few per cent of a round (docs/speed.md).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import sys
from pathlib import Path

from experiments.setup.caches import caches

TUNABLES = {
    "mmap_max": 0,  # no block of its own for a large array, which would be unmapped when freed,
    "trim_threshold": 2**40,  # and nothing is given back from the end of the heap
    "arena_max": 1,  # all threads use the one heap of which this holds
    "top_pad": 2**28,  # bytes: the heap grows in large steps,
    "hugetlb": 1,  # in pages of 2 MiB where the kernel has them
}

# Of XLA_FLAGS:
CPUS = "--xla_force_host_platform_device_count"  # as how many devices a CPU counts
TRITON = "--xla_gpu_enable_triton_gemm"  # whether matrix products may be Triton's kernels, beside cuBLAS's


def settle(devices: int = 1) -> None:
    """Set the environment and, where something has to be read at the start, start again. To be called before jax
    looks for devices.

    Args:
      devices: as how many a CPU counts, unless ``XLA_FLAGS`` says.
    """
    accelerator = accelerated()
    if devices > 1:
        _flag(CPUS, devices)
    if accelerator:
        _flag(TRITON, "false")
    keep_compiled()
    on_glibc = platform.libc_ver()[0] == "glibc"
    if on_glibc and not accelerator and "GLIBC_TUNABLES" not in os.environ and sys.orig_argv:
        tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": tunables})


def keep_compiled() -> None:
    """Have jax keep compiled programs in a folder of ours, of limited size, unless the user has chosen one.

    A folder of the user's may hold what other programs wrote without a limit, and jax then fails to write beside it. Of
    ours every program is kept, however quickly it compiled: a second start compiles nothing.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    settings = {
        "jax_compilation_cache_dir": str(caches() / "fedlora-jax"),
        "jax_compilation_cache_max_size": 2**30,  # bytes; the longest unused goes first
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    import jax  # reads them when it is first imported, which parsing options has done

    for name, value in settings.items():
        if os.environ.setdefault(name.upper(), str(value)) == str(value):
            jax.config.update(name, value)


def accelerated() -> bool:
    """Whether jax will look for an accelerator: a plugin for one is installed, and ``JAX_PLATFORMS`` leaves it in."""
    plugins = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return plugins and os.environ.get("JAX_PLATFORMS", "") != "cpu"


@functools.cache
def processor() -> tuple[str | None, int | None]:
    """What the processor is called, and the bits of its widest vectors; ``None`` where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None, None
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (said.get("flags") or said.get("Features") or "").split()
    widths = {"avx512f": 512, "avx": 256, "sse2": 128, "asimd": 128}
    return said.get("model name"), max((bits for flag, bits in widths.items() if flag in flags), default=None)


def _flag(name: str, value: object) -> None:
    """Add to ``XLA_FLAGS`` what they do not say."""
    if name not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {name}={value}".strip()
