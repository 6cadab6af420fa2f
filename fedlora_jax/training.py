"""What clients do in a round: the local steps of one of them, and one function for all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from fedlora_jax.batches import Padded, steps_taken
from fedlora_jax.gradient import forward_over_reverse
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import Cohort, Dispatch, Memory, Method
from fedlora_jax.task import of_batch

Optimizer = optax.GradientTransformation | Callable[[Array], optax.GradientTransformation]  # or one of each round


class LossFn(Protocol):
    """The mean task loss of one client's batch, a scalar; ``adapter`` is one client's, without client axis.

    Where clients take unequal numbers of steps, or epochs, the batch is a ``batches.Padded`` one.
    """

    def __call__(self, base: Params, adapter: Adapter, batch: Any, key: Array, /) -> Array: ...


class Client(NamedTuple):
    """What one client has before it in a round; ``[C, ...]`` where clients are stacked."""

    id: Array
    adapter: Adapter  # where it starts
    mask: Adapter
    context: Any
    memory: Memory = ()
    batches: Any = ()  # [T, B, ...], or Padded
    examples: Any = ()  # apart from its batches: queries, or what it is evaluated on


class Trace(NamedTuple):
    """What one client's local steps leave behind."""

    loss: Array  # [T] of each step's batch, before the step, without penalties; 0 of one that is not taken
    seen: Any  # [T, ...] what ``watch`` saw after each step


def clients_of(cohort: Cohort, sent: Dispatch, *, memory: Memory = (), batches: Any = (), examples: Any = ()) -> Client:
    """The clients of a cohort, stacked: what each was sent, and of the rest what they need."""
    return Client(cohort.ids, sent.adapter, sent.mask, sent.context, memory, batches, examples)


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
    computed again (``remat``). A step of ``Padded`` batches of which no example is there changes nothing, the
    optimizer's state included; the optimizer is told how far the client is, ``progress`` from 0 to below 1, as an extra
    argument of its update (``optax.GradientTransformationExtraArgs``). What a method combines (``Method.combine``) is
    the gradients of examples; its penalty is of the model alone and is added to that.
    """

    def model_alone(task: Callable[[Adapter], Array], adapter: Adapter, context: Any) -> tuple[Array, Array]:
        loss = task(method.model(adapter, context))
        return loss, loss

    objective = method.objective or model_alone

    def local(base: Params, adapter: Adapter, mask: Adapter, context: Any, batches: Any, key: Array, round=None):
        tx = optax.with_extra_args_support(of_round(optimizer, round))
        steps, taken = jax.tree.leaves(batches)[0].shape[0], steps_taken(batches)
        plain = partial(jax.grad, has_aux=True)
        gradient = forward_over_reverse if remat and steps > 1 else plain  # a single step has nothing to gain

        def step(carry, inputs):
            adapter, opt_state = carry
            t, batch = inputs

            def of_data(adapter, batch, key):
                return objective(of_batch(loss_fn, base, batch, key), adapter, context)

            def minimised(adapter):
                loss, reported = of_data(adapter, batch, draws)
                return loss + method.penalty(adapter, context), reported

            progress, draws = t / taken, jax.random.fold_in(key, t)
            moves_now = method.mask_schedule(mask, progress)
            if method.combine is None:
                grads, loss = gradient(minimised)(adapter)
            else:
                grads, loss = one_by_one(method.combine, of_data, adapter, moves_now, batch, draws)
                grads = jax.tree.map(jnp.add, grads, jax.grad(method.penalty)(adapter, context))
            updates, opt_state = tx.update(masked(grads, moves_now), opt_state, adapter, progress=progress)
            adapter = optax.apply_updates(adapter, masked(updates, moves_now))
            return (adapter, opt_state), Trace(loss, watch(base, adapter))

        def step_if_there(carry, inputs):
            nothing = jnp.zeros_like(jax.eval_shape(step, carry, inputs)[1].loss)
            stay = lambda: (carry, Trace(nothing, watch(base, carry[0])))  # alone (chunk 1) it costs nothing
            return jax.lax.cond(inputs[1].present.any(), lambda: step(carry, inputs), stay)

        one = step_if_there if isinstance(batches, Padded) else step
        (adapter, _), trace = jax.lax.scan(one, (adapter, tx.init(adapter)), (jnp.arange(steps), batches))
        return adapter, trace

    return local


def one_by_one(
    combine: Callable[[Adapter, Array, Array], Adapter],
    loss: Callable[[Adapter, Any, Array], tuple[Array, Array]],
    adapter: Adapter,
    mask: Adapter,
    batch: Any,
    key: Array,
) -> tuple[Adapter, Array]:
    """What ``combine`` makes of the gradients of the examples of one batch, and the mean of what they report.

    Args:
      combine: ``Method.combine``.
      loss: ``(adapter, batch, key) -> (minimised, reported)``; it is given batches of one, each with a key of its own.
      adapter: where gradients are taken; those of what the ``mask`` holds still are 0.
      batch: ``[B, ...]``, or ``Padded``; gradients of an example that only fills it up are whatever they are.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    own = batch if isinstance(batch, Padded) else Padded(batch, jnp.ones(size, bool))
    alone = jax.tree.map(lambda x: x[:, None], batch)

    def one(example: Any, key: Array) -> tuple[Adapter, Array]:
        grads, reported = jax.grad(loss, has_aux=True)(adapter, example, key)
        return masked(grads, mask), reported

    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(size))
    grads, reported = jax.vmap(one)(alone, keys)
    return combine(grads, own.present, purpose(key, "combined")), own.mean(reported)


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


def map_clients(
    f: Callable, rows: Any, chunk: int | None, mesh: Mesh | None = None, common: tuple[Any, ...] = ()
) -> Any:
    """``vmap`` of ``f(row, *common)`` over rows, at most ``chunk`` clients at once on each device of ``mesh``.

    Where clients do not divide among the devices, the last one is computed again to fill up, and dropped. Arrays from
    which ``f`` takes rows have to be among what is ``common``: those of a closure are not where a device computes.
    """
    clients = jax.tree.leaves(rows)[0].shape[0]
    if mesh is not None and mesh.size > 1:
        mesh, spare = Mesh(mesh.devices, mesh.axis_names), -clients % mesh.size  # whatever the type of its axes
        part = PartitionSpec(mesh.axis_names)
        share = lambda rows, common: map_clients(f, rows, chunk, common=common)
        fill = lambda x: jnp.concatenate([x, jnp.broadcast_to(x[-1:], (spare, *x.shape[1:]))])
        full = jax.tree.map(fill, rows) if spare else rows
        specs = part, PartitionSpec()
        out = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=part, check_vma=False)(full, common)
        return jax.tree.map(lambda x: x[:clients], out) if spare else out
    one = lambda row: f(row, *common)
    if chunk == 1:  # without an axis of clients: a stack of one would turn every product into a batched one
        return jax.lax.map(one, rows)
    if chunk is None or chunk == clients:
        return jax.vmap(one)(rows)
    if not 1 <= chunk <= clients or clients % chunk:
        fits = [c for c in range(1, clients + 1) if clients % c == 0]
        raise ValueError(f"chunk {chunk} does not divide a cohort of {clients} clients: choose one of {fits}")
    stacked = jax.tree.map(lambda x: x.reshape(clients // chunk, chunk, *x.shape[1:]), rows)
    out = jax.lax.map(jax.vmap(one), stacked)
    return jax.tree.map(lambda x: x.reshape(clients, *x.shape[2:]), out)


def masked(tree: Adapter, mask: Adapter) -> Adapter:
    """The tree where the mask lets it move, 0 elsewhere."""
    return jax.tree.map(lambda x, m: x * m.astype(x.dtype), tree, mask)
