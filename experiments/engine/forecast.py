"""What a run would need, before it is run: memory, traffic, arithmetic, time (``--dry-run``).

No method's programs are compiled. Memory is that of the process: what it holds beside arrays (libraries, images on the
host), what compiling takes of it (by how long the longest program is), arrays that stay (model, images, clients, runs)
and what a round or an evaluation computes with. Arithmetic is that of local steps. Time is that of compiling (by how
long programs are), of local steps and of evaluation. Two things are compiled alone and timed now: one step of as many
clients as are trained at once, which counts as often as a method passes over batches; and the scores of the global
model on the test images and of as many clients' models as are scored at once on their own. Aggregation is left out, and
so is setting up.

What was compiled for a run says exactly what it takes (``need``), and is refused where that is too much.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attack import has_trigger
from experiments.config import Config
from experiments.engine import chunking, evaluation, parts, traffic
from experiments.engine.staging import Staged
from experiments.engine.timed import Scoring, Step, one_scoring, one_step
from experiments.engine.trial import Trial
from experiments.results import summary
from experiments.results.summary import counted
from experiments.setup import memory
from experiments.setup.on_disk import OnDisk
from experiments.setup.problem import Problem
from fedlora_jax import rounds
from fedlora_jax.method import Method

LATER = 150 * 2**20  # bytes that a process takes for what comes last: checkpoints, pictures
COMPILING = 650  # bytes that XLA takes of a CPU's memory for each letter of a program's text; jaxlib 0.10
ROUND = 5  # times what clients are sent: sent, received, their changes, and what the server makes of them


class Need(NamedTuple):
    """Bytes."""

    held: int  # of arrays that stay on the device
    work: int  # of temporaries and results of the larger program
    process: int = 0  # that are there beside arrays, or will be; of a CPU

    @property
    def arrays(self) -> int:
        return self.held + self.work

    @property
    def peak(self) -> int:
        return self.arrays + self.process


def need(trial: Trial) -> Need | None:
    """Memory of a compiled trial, whose programs run one after another; ``None`` where XLA does not tell."""
    works = [program.memory_analysis() for program in trial.course.compiled]
    if None in works:
        return None
    new = lambda m: m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    work = max(new(m) + m.generated_code_size_in_bytes for m in works)
    return Need(trial.course.held, work, memory.beside_arrays())


def foretold(trial: Trial, letters: int, step: Step, scoring: Scoring, process: int) -> Need:
    """Memory of a trial that is not compiled.

    Args:
      trial: the method; of what its clients train all steps are taken to be those of FedIT.
      letters: of the text of the longest program.
      step, scoring: what was timed.
      process: bytes that the process held beside arrays before anything compiled.
    """
    config, problem = trial.config, trial.problem
    _, together = chunking.choose(config, problem)
    drawn = parts.steps_of(config, problem) * config.batch + trial.method.query
    rows = lambda tree: memory.bytes_of(tree) // len(config.seeds)  # of one seed
    sent = ROUND * config.cohort * rows(problem.adapters)
    of_round = step.work + sent + config.cohort * drawn * parts.bytes_of_one(problem)
    served = min(sum(config.scored), evaluation.GROUP) * rows(problem.adapters)
    work = together * max(of_round, max(scoring.work, step.work) + ROUND * served)
    if jax.default_backend() != "cpu":
        return Need(trial.course.held, work)
    more = max(0, COMPILING * letters - work)  # what compiling has given back is used again
    return Need(trial.course.held, work, process + LATER + more)


def too_large(config: Config, problem: Problem, name: str, needed: Need | None) -> str | None:
    """Why a method does not fit into memory, and what should; ``None`` where it does."""
    have = memory.available()
    if needed is None or have is None or needed.arrays <= have:
        return None
    chunk, together = chunking.choose(config, problem)
    text = (
        f"{name} needs about {_size(needed.arrays)} of memory for arrays ({_size(needed.held)} for those that stay, "
        f"{_size(needed.work)} to train {counted(chunk, 'client')} of {counted(together, 'seed')} at once), and there "
        f"are {_size(have)}: "
    )
    cohort, seeds = -(-config.cohort // config.sharing), chunking.runs_of(config, problem)
    fewer = [(s, chunk) for s in range(together - 1, 0, -1) if seeds % s == 0]  # first fewer seeds, then fewer clients
    fewer += [(1, c) for c in range(chunk - 1, 0, -1) if cohort % c == 0]
    part = lambda s, c: needed.held + math.ceil(needed.work * s * c / (together * chunk))
    fits = next(((s, c) for s, c in fewer if part(s, c) <= have), None)
    if fits is None:
        return text + f"even one client at a time needs about {_size(part(1, 1))}; use a smaller --batch or model"
    return text + f"--seeds-at-once {fits[0]} --chunk {fits[1]} should fit, with about {_size(part(*fits))}"


class Own(NamedTuple):
    """What one method would need."""

    need: Need
    seconds: tuple[float, float, float]  # of compiling, of all rounds, of all scores; of all seeds
    passes: float  # of clients over batches in a round


class Foretold(NamedTuple):
    """What all of them would need, and from what that was found."""

    methods: list[Own]
    step: Step
    scoring: Scoring
    of_letter: float  # seconds of compiling
    process: int  # bytes that the process holds beside arrays


def foretell(
    config: Config, problem: Problem, trials: Sequence[Trial], clock: Callable[[], float] = time.perf_counter
) -> Foretold:
    """What traced methods would need; ``clock`` says of what seconds are, of the CPU say (``time.process_time``)."""
    process = memory.beside_arrays()
    config = dataclasses.replace(config, local_steps=problem.longest or config.local_steps)
    step, scoring = one_step(config, problem, clock), one_scoring(config, problem, clock)
    compiled, methods = (step.compiled, scoring.compiled), []
    of_letter = sum(x.seconds for x in compiled) / sum(x.letters for x in compiled)
    for trial in trials:
        passes = trial.method.meta_gradient.passes(config.local_steps) * config.cohort
        letters = [len(x.as_text()) for x in (trial.course.lowered, *trial.course.lowered_scores())]
        took = of_letter * sum(letters), *seconds(config, trial.method, step, scoring, passes)
        methods.append(Own(foretold(trial, max(letters), step, scoring, process), took, passes))
    return Foretold(methods, step, scoring, of_letter, process)


def table(config: Config, problem: Problem, trials: Sequence[Trial]) -> str:
    """One line for each method, and how its numbers were found."""
    notes, have, frozen = unequal(problem), memory.available(), _count(problem.base)
    methods, step, scoring, of_letter, process = foretell(config, problem, trials)
    rows = [["method", "frozen", "trained", "KiB up", "KiB down", "GFLOP/round", "peak memory", "compile s"]]
    rows[0] += ["rounds s", "scores s", "run s"]
    for trial, own in zip(trials, methods, strict=True):
        ranks = np.asarray(problem.clients.population.ranks)[0]
        cohort = tuple(int(r) for r in np.resize(ranks, config.cohort))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), problem.adapters)
        up, down = (x / len(cohort) / 1024 for x in traffic.whole_round(trial.method, shapes, cohort))
        rows.append(
            [
                trial.name,
                f"{frozen:,}",
                f"{trained(config, problem, trial.method):,.0f}",
                f"{up:.1f}",
                f"{down:.1f}",
                f"{own.passes * step.flops / step.clients / 1e9:.3g}",
                _size(own.need.peak),
                *(f"{x:.3g}" for x in (*own.seconds, sum(own.seconds))),
            ]
        )
        if reason := too_large(config, problem, trial.name, own.need):
            notes.append(reason)
    return "\n".join(
        [
            *summary.aligned(rows),
            "",
            "trained: numbers that may move on a client in the first round; KiB: of one client in one round;",
            f"rounds s: {counted(config.rounds, 'round')} of {counted(len(config.seeds), 'seed')} without aggregation, "
            f"from a local step of {counted(step.clients, 'client')} timed now ({1e3 * step.seconds:.3g} ms);",
            f"scores s: {counted(config.rounds // config.eval_every, 'evaluation')}, from the global model on all test "
            f"images ({1e3 * scoring.whole:.3g} ms) and a client's on its own ({1e3 * scoring.own:.3g} ms);",
            f"compile s: by the length of programs, a million letters in the {1e6 * of_letter:.3g} s that it took now; "
            "run s: all three;",
            f"peak memory: of the process, which holds {_size(process)} beside arrays; "
            f"free for arrays: {'unknown' if have is None else _size(have)}",
            *devices_share(config),
            images_are(problem, trials[0]),
            *kept_are(config, trials),
            *notes,
        ]
    )


def devices_share(config: Config) -> list[str]:
    """What they do, where there are several."""
    of, number = ("seeds", len(config.seeds)) if config.sharing_seeds > 1 else ("clients of a round", config.cohort)
    devices = config.sharing * config.sharing_seeds
    return [f"{devices} devices share the {number} {of}, {-(-number // devices)} for one"] if devices > 1 else []


def images_are(problem: Problem, trial: Trial) -> str:
    """Where they are while a run goes on, and what it costs to stage them."""
    x, count = problem.train[0], len(problem.train[1]) + len(problem.test[1])
    what = f"{count:,} images" if x.dtype == np.uint8 else f"stored tokens of {count:,} images"
    all_of_them = f"{what} ({_size(count * parts.bytes_of_one(problem))})"
    if not problem.staged or not isinstance(trial.course, Staged):
        return f"--images resident: {all_of_them} are all on the device"
    reading = trial.course.reading()
    return (
        f"--images staged: {all_of_them} stay {'on disk' if isinstance(x, OnDisk) else 'on the host'}; a round draws "
        f"{_size(reading.of_round)} of them, in {1e3 * reading.seconds:.3g} ms now, an evaluation up to "
        f"{_size(reading.of_scores)}, while what comes before computes; {_size(reading.held)} of memory hold both"
    )


def kept_are(config: Config, trials: Sequence[Trial]) -> list[str]:
    """Where what clients keep is, a line for each method that has them keep anything, and what it costs to move it."""
    said = []
    for trial in trials:
        size = memory.bytes_of(trial.kept)
        what = f"what {trial.name} has {config.clients:,} clients keep ({_size(size)})"
        if size and not (isinstance(trial.course, Staged) and trial.course.hosted):
            said.append(f"--kept resident: {what} is all on the device")
        elif size:
            moved, took = trial.course.moving()  # type: ignore[union-attr]
            part = trial.course.sizes  # type: ignore[union-attr]
            said.append(
                f"--kept staged: {what} stays on the host; for {part.rounds} rounds {_size(moved)} of it, of up to "
                f"{part.kept} clients, go to the device and back, in {1e3 * took:.3g} ms now"
            )
    return said


def unequal(problem: Problem) -> list[str]:
    """What is to be said where clients take unequal numbers of local steps."""
    if problem.longest is None:
        return []
    fewest, mean, most = (np.array(column) for column in zip(*problem.record["local_steps"], strict=True))
    return [
        f"clients take {fewest.min()} to {most.max()} local steps, mean {mean.mean():.1f}; counted are "
        f"{most.max()} for each, which is what clients side by side compute (--chunk 1 skips what is not taken)"
    ]


def seconds(config: Config, method: Method, step: Step, scoring: Scoring, passes: float) -> tuple[float, float]:
    """Of a whole run's local steps, with ``passes`` of batches in a round, and of its evaluations.

    Several devices share the clients of a round, and those that are scored; the global model each of them scores. Or
    they share seeds.
    """
    most = lambda clients: -(-clients // config.sharing)  # of one device
    everybody, one = most(sum(config.scored)), step.seconds / step.clients
    seeds = -(-len(config.seeds) // config.sharing_seeds)  # of one device
    training = config.rounds * passes / config.cohort * most(config.cohort) * one
    times = config.rounds // config.eval_every
    tuned = min(times, -(-summary.WINDOW // config.eval_every))
    trials = most(config.scored[1]) * config.local_steps if method.onboard else 0
    steps = times * trials + tuned * everybody * config.local_steps
    own = scoring.own + (scoring.whole if config.novel else 0.0)  # then every model sees all test images
    whole = scoring.whole * (2 if has_trigger(config.attack) else 1)  # without the trigger, and with it
    evaluation = times * whole + (times + tuned) * everybody * own + steps * one
    return seeds * training, seeds * evaluation


def trained(config: Config, problem: Problem, method: Method) -> float:
    """Numbers that may move on a client in the first round, mean over the clients of the first seed."""

    def moving(base, adapter, clients, key):
        run = rounds.start(method, key, adapter, config.clients)
        cohort = clients.training(config.clients).cohort(jnp.arange(config.clients), run.memory)
        sent = method.dispatch(base, run.state, cohort)
        full = lambda m, x: jnp.broadcast_to(m, x.shape).sum() / config.clients
        return sum(jax.tree.leaves(jax.tree.map(full, sent.mask, sent.adapter)))

    first = jax.tree.map(lambda x: x[0], (problem.adapters, problem.clients, problem.keys))
    return float(jax.jit(partial(moving, problem.base))(*first))


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
