"""Benchmarks: ``python -m experiments bench NAME``, a module for each name.

Every bench prints JSON lines with the fields of ``measure.FIELDS`` (what they mean stands there) and, with ``--out``,
writes them to ``bench.jsonl`` beside one picture. What is compared lies in ``works.py``, who compares in
``contenders/``. The peers are no dependency of anything; to have them, in an environment of their own:

    python -m venv peers
    peers/bin/pip install -e ".[bench]" torch "transformers>=5" peft "flwr[simulation]"
    python -m experiments bench peers --python peers/bin/python

fedjax calls ``jax.tree_map``, which JAX has removed: it needs an environment with an older JAX, see
``contenders/fedjax.py``. A contender that is not installed gives a line that says how to install it.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from experiments.bench.options import Options
from experiments.engine import methods
from experiments.options import check_fields


def execute(options: Options) -> list[dict[str, Any]]:
    """Run one bench: lines to stdout as they come, and to the folder at the end."""
    check_fields(options)
    for name in options.methods:
        methods.check(name)
    bench = importlib.import_module(f"experiments.bench.bench_{options.bench}")
    lines = []
    for line in bench.run(options):
        print(json.dumps(line), flush=True)
        lines.append(line)
    if options.out is not None:
        from experiments.bench import picture
        from experiments.results.record import write_atomically

        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "bench.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        write_atomically(folder / f"{options.bench}.png", picture.draw(options.bench, lines))
    return lines
