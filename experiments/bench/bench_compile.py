"""Seconds to trace, lower and compile one round of each method, and to compile it again from a persistent cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from experiments.bench import works
from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.measure import Line, line
from experiments.bench.options import Options
from experiments.engine import methods
from experiments.engine.facts import describe


def run(options: Options) -> Iterator[Line]:
    """The first program pays for what the others reuse (traces of parts of the model): one runs before, uncounted."""
    work = works.find(options.work)
    p, chosen = ours.problem(work), options.methods or tuple(methods.names())
    ours.compiled(*ours.arguments(work, p, chosen[0]))
    for name in tqdm(chosen, desc="compiling", dynamic_ncols=True):
        program = ours.arguments(work, p, name)
        fresh = _afresh(program)
        with _cache():
            _afresh(program)  # writes it
            cached = _afresh(program)
        yield line(
            options.bench,
            work,
            "fedlora_jax",
            compile_seconds=sum(fresh.values()),
            method=name,
            **{f"{stage}_seconds": seconds for stage, seconds in fresh.items() if stage != "compile"},
            backend_seconds=fresh["compile"],
            cached_compile_seconds=sum(cached.values()),
            cached_backend_seconds=cached["compile"],
            **describe(),
        )


def _afresh(program: tuple) -> dict[str, float]:
    jax.clear_caches()
    return ours.compiled(*program).seconds


@contextmanager
def _cache():
    """A persistent cache of its own, every program in it, and afterwards the settings as they were."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = [getattr(jax.config, name) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, value in zip(names, (folder, 0.0, -1), strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in zip(names, before, strict=True):
                jax.config.update(name, value)
            compilation_cache.reset_cache()
