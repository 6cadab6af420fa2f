"""One federated round as one pure function, its evaluation twin, and the loop over rounds.

Nothing here is jitted: the caller jits, scans, vmaps, shards, checkpoints or differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from fedlora_jax import attacks, diagnostics
from fedlora_jax.attacks import Attack
from fedlora_jax.batches import mean_over_steps
from fedlora_jax.checks import refuse_other_clients, refuse_twice, refuse_unread, refuse_widened
from fedlora_jax.clients import (
    Population,
    Sampling,
    sample_answers,
    sample_ids,
    sample_members,
    sample_stops,
    sample_views,
)
from fedlora_jax.diagnostics import Aggregation
from fedlora_jax.keys import purpose
from fedlora_jax.leaving_out import if_any, without_failed
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import Cohort, Dispatch, Memory, Method, State, average_client, models
from fedlora_jax.task import of_batch, of_model
from fedlora_jax.training import Client, LossFn, Optimizer, clients_of, make_local, map_clients, masked


class MetricFn(Protocol):
    """Scores of one client's examples; whatever they are, ``make_evaluate`` stacks them ``[C, ...]``."""

    def __call__(self, base: Params, adapter: Adapter, examples: Any, /) -> Any: ...


class Info(NamedTuple):
    """What one round reports."""

    ids: Array  # [C] who took part; -1 at a place where nobody did (clients.Sampling)
    loss: Array  # [C] each client's task loss (penalties left out), mean over its local steps, nan where nobody is; [1]
    #   of pooled data
    aggregation: Aggregation
    learned: dict[str, Array]  # the method's own report on its new state
    moved: Array  # [C] how far its local steps took each client: the norm of the change of all that it trains
    dropped: Array  # [] clients that did not count: they never answered, or were left out (``leaving_out``)


class Run(NamedTuple):
    """All that a run carries from round to round."""

    state: State
    memory: Memory  # [N, ...] one row per client of the population
    round: Array  # rounds done


class Scores(NamedTuple):
    """Each client's scores on its own examples, ``[C, ...]``."""

    before: Any  # with the model as dispatched
    after: Any  # after local steps from there; None where the cohort brought no batches


class RoundFn(Protocol):
    """One round, as ``make_round`` makes it: the new state, what clients keep ``[C, ...]``, and what it reports."""

    def __call__(
        self, base: Params, state: State, cohort: Cohort, key: Array, round: Array | int | None = None
    ) -> tuple[State, Memory, Info]: ...


class StepFn(Protocol):
    """One round, sampling included, or several, as ``make_step``, ``make_host_step`` and ``scan_rounds`` make it."""

    def __call__(self, base: Params, data: Any, population: Population, run: Run, key: Array) -> tuple[Run, Info]: ...


class EvaluateFn(Protocol):
    """Every client's model on its own examples ``[C, ...]``, as ``make_evaluate`` makes it."""

    def __call__(
        self, base: Params, state: State, cohort: Cohort, examples: Any, key: Array, round: Array | int | None = None
    ) -> Scores: ...


def make_round(
    method: Method,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    chunk: int | None = None,
    remat: bool = True,
    mesh: Mesh | None = None,
    judge_fn: LossFn | None = None,
    attack: Attack = attacks.NOBODY,
) -> RoundFn:
    """``round_fn(base, state, cohort, key, round=None) -> (state, memory [C, ...], info)``.

    Dispatch, local steps, aggregation of those whose training did not fail (``leaving_out``); ``round`` is its number
    from 0, for an optimizer that follows rounds.

    Args:
      method: what is sent and how it is put together again.
      loss_fn: ``(base, adapter, batch, key) -> scalar`` mean task loss of one client's batch (``batches.Padded`` where
        clients' steps are unequal in number).
      optimizer: any optax transformation; each client starts it afresh each round, so its schedules run over the local
        steps of one round. Or a function of the round's number (traced) that gives one, for what follows rounds:
        ``lambda round: optax.sgd(over_rounds(round))``, or over all local steps
        ``lambda round: optax.sgd(lambda step: over_steps(T * round + step))``.
      chunk: clients trained at once (vmapped) on each device; chunks follow one another. Must divide the clients of a
        device; ``None``: all at once. Results do not depend on it, memory and speed do.
      remat: where rounds or steps are differentiated, compute each local gradient again instead of keeping what it
        took (``gradient.forward_over_reverse``): memory of one step instead of ``T``, half as much arithmetic again
        (faster all the same where memory traffic limits). Forward mode needs ``False``. Without effect where nothing
        is differentiated.
      mesh: devices that share the cohort, an equal number of clients each (filled up where they do not divide);
        everything else they all compute. Of one process or of several (``jax.distributed``), then with global arrays as
        arguments. Results agree to rounding.
      judge_fn: what models are judged by on examples that clients keep apart (HyperLoRA, IFCA), where that is not
        ``loss_fn``: the loss without the dropout of training, say.
      attack: what those clients do that are malicious, as the cohort says (``fedlora_jax.attacks``).
    """
    local, judge_fn = make_local(method, loss_fn, optimizer, remat=remat), judge_fn or loss_fn

    def round_fn(base: Params, state: State, cohort: Cohort, key: Array, round=None) -> tuple[State, Memory, Info]:
        refuse_twice(cohort.ids)
        ids, cohort = cohort.ids, method.pool(attacks.poisoned(attack, cohort))
        at_once, shared_by = (chunk, mesh) if len(ids) == len(cohort.ids) else (None, None)
        cohort = cohort._replace(weights=cohort.weights / jnp.maximum(cohort.weights.sum(), 1e-12))
        if method.query and not jax.tree.leaves(cohort.queries):
            raise ValueError(
                "the method judges models on queries and the cohort has none: see make_step, sample_held_out"
            )
        sent = method.dispatch(base, state, cohort)
        refuse_unread(method, loss_fn, sent, cohort, key)

        def client(own: Client):
            draws = jax.random.fold_in(key, own.id)
            tune = lambda start: local(sent.base, start, own.mask, own.context, own.batches, draws, round)
            last = jax.random.fold_in(draws, jnp.iinfo(jnp.int32).max)
            judge = of_model(
                of_batch(judge_fn, sent.base, own.examples, last), lambda end: method.model(end, own.context)
            )
            received, trace, meta_gradient = method.meta_gradient.train(tune, judge, own.adapter)
            meta_gradient = meta_gradient if meta_gradient == () else masked(meta_gradient, own.mask)
            change = jax.lax.stop_gradient(jax.tree.map(jnp.subtract, received, own.adapter))  # |0| has no derivative
            kept = method.remember(own.memory, own.context, own.adapter, received)
            return received, kept, trace.loss, optax.tree.norm(change), meta_gradient

        rows = clients_of(cohort, sent, memory=cohort.memory, batches=cohort.batches, examples=cohort.queries)
        received, memory, losses, moved, meta_gradients = map_clients(client, rows, at_once, shared_by)
        loss = jax.vmap(mean_over_steps)(cohort.batches, losses)
        received, meta_gradients = attacks.sent_by(attack, method, cohort, sent, received, meta_gradients, key)
        there = without_failed(cohort._replace(losses=losses), sent.adapter, received, memory, meta_gradients)
        cohort = there.cohort
        learned = method.learn(state, cohort, there.meta_gradients)
        new_state = method.aggregate(base, learned, cohort, sent, there.received)
        refuse_widened(state, new_state)
        new_state = new_state if method.always else if_any(cohort.weights, new_state, state)
        after = method.dispatch(base, new_state, average_client(cohort._replace(memory=there.memory)))
        part = lambda d: d._replace(adapter=method.aggregated(d.adapter) if method.aggregated else models(method, d))
        ends = part(sent._replace(adapter=there.received)).adapter
        bias = diagnostics.measure(part(sent), ends, cohort.weights, part(after))
        return new_state, there.memory, Info(ids, loss, bias, method.report(new_state), moved, there.dropped)

    return round_fn


def make_evaluate(
    method: Method,
    metric_fn: MetricFn,
    loss_fn: LossFn | None = None,
    optimizer: Optimizer | None = None,
    *,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> EvaluateFn:
    """``evaluate(base, state, cohort, examples [C, ...], key, round=None) -> Scores``.

    Client ``c``'s model is row ``c`` of what the method dispatches to the cohort: the same path as in training, so a
    cohort of ``average_client`` gives the global model and a cohort of clients never seen gives theirs. If the cohort
    brings batches (then ``loss_fn`` and ``optimizer`` are needed) models are also scored after local steps on them,
    with the optimizer of ``round``: that of the round to come is ``run.round``.
    """
    local = make_local(method, loss_fn, optimizer) if loss_fn is not None and optimizer is not None else None

    def evaluate(base: Params, state: State, cohort: Cohort, examples: Any, key: Array, round=None) -> Scores:
        sent: Dispatch = method.dispatch(base, state, cohort)
        tune = len(jax.tree.leaves(cohort.batches)) > 0
        if tune and local is None:
            raise ValueError("the cohort brings batches for local steps: make_evaluate needs loss_fn and optimizer")

        def client(own: Client):
            score = lambda carried: metric_fn(sent.base, method.model(carried, own.context), own.examples)
            before = score(own.adapter)
            if not tune or local is None:
                return Scores(before, None)
            draws = jax.random.fold_in(key, own.id)
            tuned, _ = local(sent.base, own.adapter, own.mask, own.context, own.batches, draws, round)
            return Scores(before, score(tuned))

        return map_clients(client, clients_of(cohort, sent, batches=cohort.batches, examples=examples), chunk, mesh)

    return evaluate


def make_onboard(
    method: Method, loss_fn: LossFn, optimizer: Optimizer, *, chunk: int | None = None, mesh: Mesh | None = None
) -> Callable[..., Memory]:
    """``onboard(base, state, cohort, key, round=None) -> memory [C, ...]`` of clients that never took part.

    They take the cohort's local steps once, after ``method.onboard``; the server learns nothing. Where the method has
    no use for it (``None``) memory stays as it is.
    """
    local, trial = make_local(method, loss_fn, optimizer), method.onboard

    def onboard(base: Params, state: State, cohort: Cohort, key: Array, round=None) -> Memory:
        if trial is None:
            return cohort.memory
        sent = method.dispatch(base, trial.start(state), cohort)

        def client(own: Client):
            draws = jax.random.fold_in(key, own.id)
            return local(sent.base, own.adapter, own.mask, own.context, own.batches, draws, round)[0]

        received = map_clients(client, clients_of(cohort, sent, batches=cohort.batches), chunk, mesh)
        return trial.place(state, cohort.memory, sent.adapter, received)

    return onboard


def start(method: Method, key: Array, adapter: Adapter, clients: int) -> Run:
    """The state of a run before its first round, for a population of ``clients``."""
    row = method.init_client(adapter)
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)).copy(), row)
    state = jax.tree.map(jnp.copy, method.init(key, adapter))  # its own arrays: a run may be donated, arguments may not
    return Run(state, memory, jnp.zeros((), jnp.int32))


def start_on_host(method: Method, key: Array, adapter: Adapter, clients: int) -> Run:
    """``start`` with what clients keep as NumPy arrays ``[N, ...]``, for ``make_host_step``."""
    row = jax.device_get(method.init_client(adapter))
    memory = jax.tree.map(lambda x: np.tile(x, (clients, *(1,) * np.ndim(x))), row)
    return start(method, key, adapter, clients=0)._replace(memory=memory)


def make_step(
    round_fn: RoundFn,
    *,
    participants: int,
    steps: int,
    batch: int,
    smallest: int,
    query: int = 0,
    dropouts: float = 0.0,
    stragglers: float = 0.0,
    sampling: Sampling | None = None,
) -> StepFn:
    """``step(base, data, population, run, key) -> (run, info)``: a whole round, sampling included.

    Args:
      round_fn: from ``make_round``.
      participants: clients per round.
      steps, batch: local steps ``T`` and batch size ``B``; ``T`` the most that any client takes, where
        ``Population.examples`` says how much each goes through.
      smallest: images of the smallest client; a method with queries keeps some of them apart, so it needs two.
      query: of the method. That many images are kept apart from the local steps, others each round.
      dropouts: share of the clients of a round that never answer, others each round: the round is as if they had not
        been drawn.
      stragglers: share of them that stop before their last local step, others each round and after any step; batches
        are then ``Padded``.
      sampling: who takes part, where that is not everybody who is drawn; its ``most`` is ``participants``.
    """
    drawing: dict[str, Any] = {"steps": steps, "batch": batch, "smallest": smallest, "query": query}
    drawing |= {"dropouts": dropouts, "stragglers": stragglers, "sampling": sampling}
    placed = make_placed_step(make_cohort_step(round_fn, **drawing))

    def step(base: Params, data: Any, population: Population, run: Run, key: Array) -> tuple[Run, Info]:
        refuse_other_clients(run.memory, population.sizes.shape[0])
        ids = draw_ids(key, run.round, population.sizes.shape[0], participants)
        return placed(base, data, population, run, key, ids, ids)

    return step


def make_placed_step(cohort_step: Callable) -> Callable[..., tuple[Run, Info]]:
    """``step(base, data, population, run, key, ids [C], places [C]) -> (run, info)``: a round of the clients ``ids``.

    What they keep is at ``places`` of ``run.memory``, which may hold no more than some clients' rows: those that take
    part in the rounds to come, say. With the numbers of ``draw_ids`` it is the round of ``make_step``.

    Args:
      cohort_step: ``make_cohort_step``.
    """

    def step(base: Params, data: Any, population: Population, run: Run, key: Array, ids: Array, places: Array):
        memory = jax.tree.map(lambda x: x[places], run.memory)
        state, memory, info = cohort_step(base, data, population.members(ids), ids, run.state, memory, run.round, key)
        kept = jax.tree.map(lambda rows, new: rows.at[places].set(new), run.memory, memory)
        return Run(state, kept, run.round + 1), info

    return step


def make_host_step(cohort_step: Callable, *, participants: int) -> StepFn:
    """``make_step`` for populations that the device cannot hold; the same numbers, not to be jitted.

    Who takes part is drawn on the CPU; of what clients are and keep the device is given the cohort's rows. Its memory
    does not depend on the number of clients.

    Args:
      cohort_step: ``make_cohort_step``, jitted.
      participants: clients per round.

    Returns:
      ``step(base, data, population, run, key) -> (run, info)`` on a population of NumPy arrays and a run from
      ``start_on_host``, **whose memory is written in place**.
    """
    cpu = jax.local_devices(backend="cpu")[0]

    def step(base: Params, data: Any, population: Population, run: Run, key: Array) -> tuple[Run, Info]:
        refuse_other_clients(run.memory, population.sizes.shape[0])
        with jax.default_device(cpu):
            who, count = jax.device_put((key, run.round), cpu)
            ids = np.asarray(draw_ids(who, count, len(population.sizes), participants))
        memory = jax.tree.map(lambda x: x[ids], run.memory)
        state, memory, info = cohort_step(base, data, population.members(ids), ids, run.state, memory, run.round, key)
        for rows, new in zip(*map(jax.tree.leaves, (run.memory, jax.device_get(memory))), strict=True):
            rows[ids] = new
        return Run(state, run.memory, run.round + 1), info

    return step


def make_cohort_step(
    round_fn: RoundFn,
    *,
    steps: int,
    batch: int,
    smallest: int,
    query: int = 0,
    dropouts: float = 0.0,
    stragglers: float = 0.0,
    sampling: Sampling | None = None,
) -> Callable:
    """What follows once it is known who takes part; arguments as for ``make_step``.

    Returns:
      ``cohort_step(base, data, members [C], ids [C], state, memory [C, ...], round, key) -> (state, memory, info)``,
      where ``members`` is the part of the population that takes part.
    """

    def cohort_step(
        base, data, members: Population, ids: Array, state: State, memory: Memory, number: Array, key: Array
    ):
        _, draw, train = jax.random.split(jax.random.fold_in(key, number), 3)
        if stragglers:
            whole = jnp.full(len(ids), steps * batch) if isinstance(members.examples, tuple) else members.examples
            members = members._replace(examples=sample_stops(draw, ids, stragglers, jnp.asarray(whole), batch))
        batches, queries = sample_members(draw, data, members, ids, steps, batch, smallest, query)
        views = sample_views(draw, members, ids)
        cohort = members.cohort(jnp.arange(len(ids)), (), batches, queries, views)._replace(ids=ids, memory=memory)
        if dropouts:
            cohort = cohort._replace(weights=cohort.weights * sample_answers(draw, ids, dropouts))
        if sampling is None or sampling.rate == 1:
            return round_fn(base, state, cohort, train, number)
        there = sampling.joined(purpose(jax.random.fold_in(key, number), "joined"))
        cohort = cohort._replace(weights=jnp.where(there, cohort.weights, 0.0))
        state, kept, info = round_fn(base, state, cohort, train, number)
        nobody = info._replace(ids=jnp.where(there, ids, -1), loss=jnp.where(there, info.loss, jnp.nan))
        return state, kept, nobody._replace(dropped=info.dropped - jnp.sum(~there).astype(jnp.int32))

    return cohort_step


def draw_ids(key: Array, number: Array, clients: int, participants: int) -> Array:
    """``[participants]`` clients of round ``number``."""
    return sample_ids(jax.random.split(jax.random.fold_in(key, number), 3)[0], clients, participants)


def scan_rounds(step: StepFn, rounds: int) -> StepFn:
    """``rounds`` steps as one scan: the same arguments, ``info`` stacked ``[rounds, ...]``."""

    def many(base: Params, data: Any, population: Population, run: Run, key: Array) -> tuple[Run, Info]:
        return jax.lax.scan(lambda run, _: step(base, data, population, run, key), run, length=rounds)

    return many
