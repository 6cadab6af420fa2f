"""One contender in a process of its own: ``python -m experiments.bench.peer NAME WORK [chunk=N] [devices=N]``.

Speaks JSON lines: first what it is (or ``{"skipped": "pip install ..."}``), then, for every line it reads, one round.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from experiments.bench import measure, works
from experiments.bench.contenders import INSTALL


def main(name: str, work_name: str, *options: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # whatever a framework prints goes to stderr
    os.dup2(2, 1)
    say = lambda message: print(json.dumps(message), file=answers)
    work = works.find(work_name)
    told = {option: int(value) for option, value in (text.split("=") for text in options)}
    try:
        module = importlib.import_module(f"experiments.bench.contenders.{name}")
        contender = module.contender(work, **told)
    except ImportError as error:
        say({"skipped": f"pip install {INSTALL[name]}", "reason": f"{error}"})
        return
    say(contender.about)
    for _ in sys.stdin:
        say(measure.turn(work, contender))


if __name__ == "__main__":
    main(*sys.argv[1:])
