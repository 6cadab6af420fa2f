"""What a run would need, before it is run: memory, traffic, arithmetic, time (``--dry-run``).

Memory is that of the compiled programs: arrays that stay (model, images, clients, runs) and what the larger of the two
programs, rounds and evaluation, computes with. Arithmetic and time are those of local steps: one step of as many
clients as are trained at once, compiled alone and timed now, times the passes of a method. For evaluation an image
costs a third of what it costs in a step. Aggregation is left out of both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import layout, programs, summary
from experiments.config import Config
from experiments.problem import Problem, make_optimizer
from fedlora_jax import rounds
from fedlora_jax.method import Method
from fedlora_jax.methods.fedit import fedit

if TYPE_CHECKING:
    from experiments.compare import Trial

REPEATS = 3


class Need(NamedTuple):
    """Bytes."""

    held: int  # of arrays that stay on the device
    work: int  # of temporaries and results of the larger program

    @property
    def peak(self) -> int:
        return self.held + self.work


class Step(NamedTuple):
    """One local step of ``clients`` clients at once."""

    clients: int
    seconds: float
    flops: float


def need(held: Any, compiled: Sequence[Any]) -> Need | None:
    """Memory of programs that run one after another while ``held`` stays; ``None`` where XLA does not tell."""
    works = [program.memory_analysis() for program in compiled]
    if None in works:
        return None
    new = lambda m: m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return Need(_bytes(held), max(new(m) + m.generated_code_size_in_bytes for m in works))


def too_large(config: Config, problem: Problem, name: str, needed: Need | None) -> str | None:
    """Why a method does not fit into memory, and what should; ``None`` where it does."""
    have = layout.memory()
    if needed is None or have is None or needed.peak <= have:
        return None
    chunk, together = layout.layout(config, problem)
    text = (
        f"{name} needs about {_size(needed.peak)} of memory ({_size(needed.held)} for arrays that stay, "
        f"{_size(needed.work)} to train {chunk} clients of {together} seeds at once), and there are {_size(have)}: "
    )
    cohort, seeds = (config.clients_per_round or config.clients) // config.devices, problem.keys.shape[0]
    fewer = [(s, chunk) for s in range(together - 1, 0, -1) if seeds % s == 0]  # first fewer seeds, then fewer clients
    fewer += [(1, c) for c in range(chunk - 1, 0, -1) if cohort % c == 0]
    part = lambda s, c: needed.held + math.ceil(needed.work * s * c / (together * chunk))
    fits = next(((s, c) for s, c in fewer if part(s, c) <= have), None)
    if fits is None:
        return text + f"even one client at a time needs about {_size(part(1, 1))}; use a smaller --batch or model"
    return text + f"--seeds-at-once {fits[0]} --chunk {fits[1]} should fit, with about {_size(part(*fits))}"


def table(config: Config, problem: Problem, trials: Sequence[Trial]) -> str:
    """One line for each compiled method, and how its numbers were found."""
    step, have = one_step(config, problem), layout.memory()
    frozen = _count(problem.base)
    rows = [["method", "frozen", "trained", "KiB up", "KiB down", "GFLOP/round", "peak memory", "compile s", "run s"]]
    notes = []
    for trial in trials:
        ranks = np.asarray(problem.clients.population.ranks)[0]
        cohort = tuple(int(r) for r in np.resize(ranks, config.clients_per_round or config.clients))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), problem.adapters)
        up, down = (x / len(cohort) / 1024 for x in programs.traffic_bytes(trial.method, shapes, cohort))
        passes = trial.method.slope.passes(config.local_steps) * len(cohort)
        needed = trial.need()
        rows.append(
            [
                trial.name,
                f"{frozen:,}",
                f"{trained(config, problem, trial.method):,.0f}",
                f"{up:.1f}",
                f"{down:.1f}",
                f"{passes * step.flops / step.clients / 1e9:.3g}",
                "unknown" if needed is None else _size(needed.peak),
                f"{trial.compile_seconds:.1f}",
                f"{seconds(config, problem, step, passes):.3g}",
            ]
        )
        if reason := too_large(config, problem, trial.name, needed):
            notes.append(reason)
    return "\n".join(
        [
            *summary.aligned(rows),
            "",
            "trained: numbers that may move on a client in the first round; KiB: of one client in one round;",
            f"run s: {config.rounds} rounds of {len(config.seeds)} seeds, from a local step of {step.clients} clients "
            f"compiled alone and timed now ({1e3 * step.seconds:.3g} ms);",
            "evaluation at a third of a step for each image; without aggregation and compiling",
            f"memory there is: {'unknown' if have is None else _size(have)}",
            *notes,
        ]
    )


def one_step(config: Config, problem: Problem) -> Step:
    """Time of a local step of as many clients as are trained at once: the best of a few calls; and its arithmetic."""
    clients, _ = layout.layout(config, problem)
    local = rounds.make_local(fedit(), problem.loss_fn, make_optimizer(config))
    batch = tuple(x[jnp.arange(config.batch) % len(x)][None] for x in problem.train)
    adapter = jax.tree.map(lambda x: x[0], problem.adapters)
    mask = jax.tree.map(jnp.ones_like, adapter)

    def step(base, *one):
        train = lambda *one: local(base, *one, jax.random.key(0))
        return train(*one) if clients == 1 else jax.vmap(train)(*one)

    one = (adapter, mask, adapter, batch)
    one = one if clients == 1 else jax.tree.map(lambda x: jnp.stack([x] * clients), one)
    lowered = jax.jit(step).lower(problem.base, *one)
    compiled, took = lowered.compile(), []
    jax.block_until_ready(compiled(problem.base, *one))  # the first call also allocates
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(problem.base, *one))
        took.append(time.perf_counter() - begin)
    return Step(clients, min(took), (lowered.cost_analysis() or {}).get("flops", math.nan))


def seconds(config: Config, problem: Problem, step: Step, passes: float) -> float:
    """Of a whole run, with ``passes`` of batches in a round; on several devices the clients of a round are shared."""
    everybody = config.clients + config.holdout_clients
    own = everybody * problem.clients.test_rows.shape[-1]
    times = config.rounds // config.eval_every
    tuned = min(times, -(-summary.WINDOW // config.eval_every))
    images = times * (len(problem.test[1]) + own) + tuned * (own + 3 * everybody * config.local_steps * config.batch)
    steps = config.rounds * passes / config.devices + images / 3 / config.batch
    return len(config.seeds) * steps * step.seconds / step.clients


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


def _bytes(tree: Any) -> int:
    itemsize = lambda x: jax.eval_shape(jax.random.key_data, x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in map(itemsize, jax.tree.leaves(tree)))


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
