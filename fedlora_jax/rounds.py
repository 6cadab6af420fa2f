"""One federated round as one pure function, its evaluation twin, and the loop over rounds.

Nothing here is jitted: the caller jits, scans, vmaps, shards, checkpoints or differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh, PartitionSpec

from fedlora_jax import diagnostics, lora
from fedlora_jax.clients import Population, sample_ids, sample_members, sample_views
from fedlora_jax.diagnostics import Aggregation
from fedlora_jax.gradient import forward_over_reverse
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import Cohort, Dispatch, Memory, Method, State, average_client, models

Optimizer = optax.GradientTransformation | Callable[[Array], optax.GradientTransformation]  # or one of each round


class LossFn(Protocol):
    """The mean task loss of one client's batch, a scalar; ``adapter`` is one client's, without client axis."""

    def __call__(self, base: Params, adapter: Adapter, batch: Any, key: Array, /) -> Array: ...


class MetricFn(Protocol):
    """Scores of one client's examples; whatever they are, ``make_evaluate`` stacks them ``[C, ...]``."""

    def __call__(self, base: Params, adapter: Adapter, examples: Any, /) -> Any: ...


class Info(NamedTuple):
    """What one round reports."""

    ids: Array  # [C] who took part
    loss: Array  # [C] each client's task loss (penalties left out), mean over its local steps; [1] of pooled data
    aggregation: Aggregation
    learned: dict[str, Array]  # the method's own report on its new state
    moved: Array  # [C] how far its local steps took each client: the norm of the change of all that it trains


class Run(NamedTuple):
    """All that a run carries from round to round."""

    state: State
    memory: Memory  # [N, ...] one row per client of the population
    round: Array  # rounds done


class Scores(NamedTuple):
    """Each client's scores on its own examples, ``[C, ...]``."""

    before: Any  # with the model as dispatched
    after: Any  # after local steps from there; None where the cohort brought no batches


class Trace(NamedTuple):
    """What one client's local steps leave behind."""

    loss: Array  # [T] of each step's batch, before the step, without penalties
    seen: Any  # [T, ...] what ``watch`` saw after each step


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


def make_local(
    method: Method,
    loss_fn: LossFn,
    optimizer: Optimizer,
    watch: Callable[[Params, Adapter], Any] = lambda base, adapter: (),
    remat: bool = True,
) -> Callable:
    """Local training: ``(base, adapter, mask, context, batches [T, ...], key, round=None) -> (adapter, Trace)``.

    It is one client's. The optimizer (of that round) starts afresh. The mask is put on gradients, so that clipping by
    norm sees what is trained, and on updates, so that weight decay and momentum cannot move what is frozen. Whoever
    differentiates several steps keeps one adapter (and optimizer state) per step, and what a step's gradient took is
    computed again (``remat``).
    """

    def model_alone(task: Callable[[Adapter], Array], adapter: Adapter, context: Any) -> tuple[Array, Array]:
        loss = task(method.model(adapter, context))
        return loss, loss

    objective = method.objective or model_alone

    def local(base: Params, adapter: Adapter, mask: Adapter, context: Any, batches: Any, key: Array, round=None):
        tx = of_round(optimizer, round)
        steps = jax.tree.leaves(batches)[0].shape[0]
        plain = partial(jax.grad, has_aux=True)
        gradient = forward_over_reverse if remat and steps > 1 else plain  # a single step has nothing to gain

        def step(carry, inputs):
            adapter, opt_state = carry
            t, batch = inputs

            def minimised(adapter):
                task = lambda model: loss_fn(base, model, batch, jax.random.fold_in(key, t))
                loss, reported = objective(task, adapter, context)
                return loss + method.penalty(adapter, context), reported

            moves_now = method.mask_schedule(mask, t / steps)
            grads, loss = gradient(minimised)(adapter)
            updates, opt_state = tx.update(_masked(grads, moves_now), opt_state, adapter)
            adapter = optax.apply_updates(adapter, _masked(updates, moves_now))
            return (adapter, opt_state), Trace(loss, watch(base, adapter))

        (adapter, _), trace = jax.lax.scan(step, (adapter, tx.init(adapter)), (jnp.arange(steps), batches))
        return adapter, trace

    return local


def of_round(optimizer: Optimizer, round: Array | int | None) -> optax.GradientTransformation:
    """The optimizer of one round.

    Raises:
      ValueError: it follows rounds, and nobody said which one this is.
    """
    if not callable(optimizer):
        return optimizer
    if round is None:
        raise ValueError("the optimizer follows rounds: say which one this is (round=0 is the first)")
    return optimizer(round)  # type: ignore[arg-type]


def make_round(
    method: Method,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    chunk: int | None = None,
    remat: bool = True,
    mesh: Mesh | None = None,
) -> RoundFn:
    """``round_fn(base, state, cohort, key, round=None) -> (state, memory [C, ...], info)``.

    Dispatch, local steps, aggregation; ``round`` is its number from 0, for an optimizer that follows rounds.

    Args:
      method: what is sent and how it is put together again.
      loss_fn: ``(base, adapter, batch, key) -> scalar`` mean task loss of one client's batch.
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
      mesh: devices that share the cohort, an equal number of clients each; everything else they all compute. Of one
        process or of several (``jax.distributed``), then with global arrays as arguments. Results agree to rounding.
    """
    local = make_local(method, loss_fn, optimizer, remat=remat)

    def round_fn(base: Params, state: State, cohort: Cohort, key: Array, round=None) -> tuple[State, Memory, Info]:
        ids, cohort = cohort.ids, method.pool(cohort)
        at_once, shared_by = (chunk, mesh) if len(ids) == len(cohort.ids) else (None, None)
        cohort = cohort._replace(weights=cohort.weights / jnp.maximum(cohort.weights.sum(), 1e-12))
        if method.query and not jax.tree.leaves(cohort.queries):
            raise ValueError(
                "the method judges models on queries and the cohort has none: see make_step, sample_held_out"
            )
        sent = method.dispatch(base, state, cohort)
        refuse_unread(method, loss_fn, sent, cohort, key)

        def client(row):
            id_, adapter, mask, context, memory, batches, queries = row
            own = jax.random.fold_in(key, id_)
            tune = lambda start: local(sent.base, start, mask, context, batches, own, round)
            last = jax.random.fold_in(own, jnp.iinfo(jnp.int32).max)
            judge = lambda end: loss_fn(sent.base, method.model(end, context), queries, last)
            received, trace, meta_gradient = method.meta_gradient.train(tune, judge, adapter)
            meta_gradient = meta_gradient if meta_gradient == () else _masked(meta_gradient, mask)
            change = jax.lax.stop_gradient(jax.tree.map(jnp.subtract, received, adapter))  # |0| has no derivative
            kept = method.remember(memory, context, adapter, received)
            return received, kept, trace.loss.mean(), optax.tree.norm(change), meta_gradient

        rows = (cohort.ids, sent.adapter, sent.mask, sent.context, cohort.memory, cohort.batches, cohort.queries)
        received, memory, loss, moved, meta_gradients = map_clients(client, rows, at_once, shared_by)
        learned = method.learn(state, cohort, meta_gradients)
        new_state = method.aggregate(base, learned, cohort, sent, received)
        refuse_widened(state, new_state)
        after = method.dispatch(base, new_state, average_client(cohort._replace(memory=memory)))
        part = lambda d: d._replace(adapter=method.aggregated(d.adapter) if method.aggregated else models(method, d))
        ends = part(sent._replace(adapter=received)).adapter
        bias = diagnostics.measure(part(sent), ends, cohort.weights, part(after))
        return new_state, memory, Info(ids, loss, bias, method.report(new_state), moved)

    return round_fn


def refuse_widened(old: State, new: State) -> None:
    """Refuse a method that makes float32 of a state of 16 bits: rounds could not follow one another."""
    for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=False):
        if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32 and x.dtype != y.dtype:
            raise ValueError(
                f"the method computes in {y.dtype} what it was given in {x.dtype}: give it a {y.dtype} adapter, as "
                f"lora.new makes them (jax.tree.map(lambda x: x.astype({str(y.dtype)!r}), adapter)); base may stay"
            )


def refuse_unread(method: Method, loss_fn: LossFn, sent: Dispatch, cohort: Cohort, key: Array) -> None:
    """Refuse an adapter of which the loss does not read everything: that part would never be trained.

    Looks at the program of the loss on one client's batch and computes nothing.
    """
    row = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    model = jax.eval_shape(method.model, row(sent.adapter), row(sent.context))
    program = jax.make_jaxpr(loss_fn)(sent.base, model, row(row(cohort.batches)), key).jaxpr
    read = dce_jaxpr(program, [True] * len(program.outvars))[1]
    before = len(jax.tree.leaves(sent.base))
    is_read = jax.tree.unflatten(jax.tree.structure(model), read[before : before + len(jax.tree.leaves(model))])
    unread = [name for name, x in lora.flatten(is_read).items() if not all(jax.tree.leaves(x))]
    if switches := [name for name in unread if name not in lora.flatten(sent.base)]:
        raise ValueError(
            f"the method switches parts of the model by {', '.join(switches)} in the adapter, and the loss does not "
            "read it: use a model that looks for it in its lora collection, or another method"
        )
    if unread:
        raise ValueError(
            f"the loss does not read {', '.join(unread[:5])}{' ...' * (len(unread) > 5)} of the adapter, so it would "
            "never be trained. Layers of fedlora_jax.Dense read lora.variables(base, adapter); for any other model "
            "merge it, as in loss_fn = lambda base, adapter, batch, key: "
            "loss(model.apply({'params': lora.merge(base, adapter)}, batch[0]), batch[1])"
        )


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

        def client(row):
            id_, adapter, mask, context, batches, examples = row
            score = lambda carried: metric_fn(sent.base, method.model(carried, context), examples)
            before = score(adapter)
            if not tune or local is None:
                return Scores(before, None)
            tuned, _ = local(sent.base, adapter, mask, context, batches, jax.random.fold_in(key, id_), round)
            return Scores(before, score(tuned))

        rows = (cohort.ids, sent.adapter, sent.mask, sent.context, cohort.batches, examples)
        return map_clients(client, rows, chunk, mesh)

    return evaluate


def make_onboard(
    method: Method, loss_fn: LossFn, optimizer: Optimizer, *, chunk: int | None = None
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

        def client(row):
            id_, *own = row
            return local(sent.base, *own, jax.random.fold_in(key, id_), round)[0]

        received = map_clients(client, (cohort.ids, sent.adapter, sent.mask, sent.context, cohort.batches), chunk)
        return trial.place(state, cohort.memory, sent.adapter, received)

    return onboard


def map_clients(f: Callable, rows: Any, chunk: int | None, mesh: Mesh | None = None) -> Any:
    """``vmap(f)`` over the leading axis, at most ``chunk`` clients at once on each device of ``mesh``."""
    clients = jax.tree.leaves(rows)[0].shape[0]
    if mesh is not None and mesh.size > 1:
        if clients % mesh.size:
            raise ValueError(f"{clients} clients cannot be shared by {mesh.size} devices: choose a multiple of them")
        mesh = Mesh(mesh.devices, mesh.axis_names)  # whatever the type of its axes: jax shards what comes after
        part = PartitionSpec(mesh.axis_names)
        share = lambda rows: map_clients(f, rows, chunk)
        return jax.shard_map(share, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)(rows)
    if chunk == 1:  # without an axis of clients: a stack of one would turn every product into a batched one
        return jax.lax.map(f, rows)
    if chunk is None or chunk == clients:
        return jax.vmap(f)(rows)
    if not 1 <= chunk <= clients or clients % chunk:
        fits = [c for c in range(1, clients + 1) if clients % c == 0]
        raise ValueError(f"chunk {chunk} does not divide a cohort of {clients} clients: choose one of {fits}")
    stacked = jax.tree.map(lambda x: x.reshape(clients // chunk, chunk, *x.shape[1:]), rows)
    out = jax.lax.map(jax.vmap(f), stacked)
    return jax.tree.map(lambda x: x.reshape(clients, *x.shape[2:]), out)


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


def make_step(round_fn: RoundFn, *, participants: int, steps: int, batch: int, smallest: int, query: int = 0) -> StepFn:
    """``step(base, data, population, run, key) -> (run, info)``: a whole round, sampling included.

    Args:
      round_fn: from ``make_round``.
      participants: clients per round.
      steps, batch: local steps ``T`` and batch size ``B``.
      smallest: images of the smallest client; a method with queries keeps some of them apart, so it needs two.
      query: of the method. That many images are kept apart from the local steps, others each round.
    """
    cohort_step = make_cohort_step(round_fn, steps=steps, batch=batch, smallest=smallest, query=query)

    def step(base: Params, data: Any, population: Population, run: Run, key: Array) -> tuple[Run, Info]:
        check_memory(run, population)
        ids = draw_ids(key, run.round, population.sizes.shape[0], participants)
        memory = jax.tree.map(lambda x: x[ids], run.memory)
        state, memory, info = cohort_step(base, data, population.members(ids), ids, run.state, memory, run.round, key)
        kept = jax.tree.map(lambda rows, new: rows.at[ids].set(new), run.memory, memory)
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
        check_memory(run, population)
        with jax.default_device(cpu):
            who, count = jax.device_put((key, run.round), cpu)
            ids = np.asarray(draw_ids(who, count, len(population.sizes), participants))
        memory = jax.tree.map(lambda x: x[ids], run.memory)
        state, memory, info = cohort_step(base, data, population.members(ids), ids, run.state, memory, run.round, key)
        for rows, new in zip(*map(jax.tree.leaves, (run.memory, jax.device_get(memory))), strict=True):
            rows[ids] = new
        return Run(state, run.memory, run.round + 1), info

    return step


def check_memory(run: Run, population: Population) -> None:
    """Refuse a run that was started for another number of clients: rows out of range would be others'."""
    clients = population.sizes.shape[0]
    rows = {x.shape[0] for x in jax.tree.leaves(run.memory)}
    if rows - {clients}:
        raise ValueError(
            f"the run keeps rows of {max(rows)} clients between rounds, and the population has {clients}: give their "
            "number to rounds.start(..., clients=)"
        )


def make_cohort_step(round_fn: RoundFn, *, steps: int, batch: int, smallest: int, query: int = 0) -> Callable:
    """What follows once it is known who takes part; arguments as for ``make_step``.

    Returns:
      ``cohort_step(base, data, members [C], ids [C], state, memory [C, ...], round, key) -> (state, memory, info)``,
      where ``members`` is the part of the population that takes part.
    """

    def cohort_step(
        base, data, members: Population, ids: Array, state: State, memory: Memory, number: Array, key: Array
    ):
        _, draw, train = jax.random.split(jax.random.fold_in(key, number), 3)
        batches, queries = sample_members(draw, data, members, ids, steps, batch, smallest, query)
        views = sample_views(draw, members, ids)
        cohort = members.cohort(jnp.arange(len(ids)), (), batches, queries, views)
        return round_fn(base, state, cohort._replace(ids=ids, memory=memory), train, number)

    return cohort_step


def draw_ids(key: Array, number: Array, clients: int, participants: int) -> Array:
    """``[participants]`` clients of round ``number``."""
    return sample_ids(jax.random.split(jax.random.fold_in(key, number), 3)[0], clients, participants)


def scan_rounds(step: StepFn, rounds: int) -> StepFn:
    """``rounds`` steps as one scan: the same arguments, ``info`` stacked ``[rounds, ...]``."""

    def many(base: Params, data: Any, population: Population, run: Run, key: Array) -> tuple[Run, Info]:
        return jax.lax.scan(lambda run, _: step(base, data, population, run, key), run, length=rounds)

    return many


def _masked(tree: Adapter, mask: Adapter) -> Adapter:
    return jax.tree.map(lambda x, m: x * m.astype(x.dtype), tree, mask)
