"""The contract of a federated LoRA method: a few pure functions over one server state.

Letters used in every einsum of the library: ``c`` client, ``i`` in, ``r`` rank, ``o`` out; ``...`` are layers.
A leading ``C`` axis means stacked clients; inside a function of one client it is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora
from fedlora_jax.lora import Adapter, LoRA, Params, mean
from fedlora_jax.signatures import Signature, mean_client

State = Any
Memory = Any


class Cohort(NamedTuple):
    """The clients of one round, stacked."""

    ids: Array  # [C] row of each client in the population, none twice; -1 for nobody in particular
    weights: Array  # [C] p_c; make_round scales them to sum to one
    ranks: Array  # [C] columns of a (rows of b) each client may use
    signatures: Any  # [C, ...] what the server knows of each client's data (a Signature), or ()
    memory: Memory = ()  # [C, ...] what each client keeps between rounds
    batches: Any = ()  # [C, T, B, ...] data of T local steps; or batches.Padded, where some take fewer
    queries: Any = ()  # [C, Q, ...] data that a client keeps apart from them, to judge its model by
    shares: Any = ()  # [C] each client's part of the weight of the whole population; () where nobody knows
    losses: Any = ()  # [C, T] of each local step's batch, before the step, as it is reported; () before they are taken
    malicious: Any = ()  # [C] 1 for a client that attacks (``fedlora_jax.attacks``), which a method does not know; ()


class Dispatch(NamedTuple):
    """What leaves the server. Row ``c`` of it is the model of client ``c``, for training and for evaluation."""

    base: Params  # shared by all clients, no client axis
    adapter: Adapter  # [C, ...] where local training starts (Method.model makes the model's adapter of it)
    mask: Adapter  # [C, ...] 1 where an entry may move, 0 where it may not; broadcastable against adapter
    context: Any  # [C, ...] whatever else a client needs while it trains: what a penalty compares with, say


class Traffic(NamedTuple):
    """Trees whose arrays are what one client sends and receives in a round; only their sizes are read.

    Attributes:
      up: what it sends when it takes part.
      down: what it is sent whenever it takes part, to start from.
      missed: what a round leaves behind that everybody needs before they can start again, be it many rounds later:
        what was added to a residual, say.
      whole: what takes the place of all that was missed where that is more; ``()``: nothing can.
    """

    up: Any
    down: Any
    missed: Any = ()
    whole: Any = ()


class About(NamedTuple):
    """One row of the table of methods."""

    name: str
    paper: str  # authors, venue or year
    arxiv: str
    trains: str
    travels: str
    exact: str  # is the new server model the mean of the clients' models?
    personal: str = "-"  # what stays with a client
    tells: str = "-"  # what the server learns of a client beside its upload and its weight


def no_penalty(adapter: Adapter, context: Any) -> Array:
    """Nothing is added to the local loss."""
    return jnp.zeros(())


def no_memory(adapter: Adapter) -> Memory:
    """Clients keep nothing."""
    return ()


def keep_memory(memory: Memory, context: Any, sent: Adapter, received: Adapter) -> Memory:
    """What a client keeps stays as it is."""
    return memory


def as_carried(adapter: Adapter, context: Any) -> Adapter:
    """The model computes with what the client carries."""
    return adapter


def all_along(mask: Adapter, progress: Array) -> Adapter:
    """What may move may move in every local step."""
    return mask


def all_of_it(mask: Adapter) -> Adapter:
    """All that a client trains is sent."""
    return mask


def all_held(mask: Adapter, context: Any, received: Adapter) -> Adapter:
    """A client holds all that its mask says."""
    return mask


def each_alone(cohort: Cohort) -> Cohort:
    """Every client trains on its own data."""
    return cohort


class MetaGradient(NamedTuple):
    """How one client trains, and finds out how its start should have been different (``fedlora_jax.meta``)."""

    train: Callable[[Callable, Callable, Adapter], tuple[Adapter, Any, Any]]  # (tune, judge, start) ->
    #   (adapter, trace, meta_gradient): tune takes a start through the local steps, judge is the Task of examples apart
    passes: Callable[[int], int]  # local steps -> forward and backward computations of a batch, all in all


class Onboarding(NamedTuple):
    """How a method gets to know a client that never took part, by a trial (``rounds.make_onboard``)."""

    start: Callable[[State], State]  # what is dispatched from this state, the client takes its local steps from
    place: Callable[[State, Memory, Adapter, Adapter], Memory]  # (state, memory, sent, received) -> memory, of adapters
    #   and memory [C, ...]


no_meta_gradient = MetaGradient(lambda tune, judge, start: (*tune(start), ()), lambda steps: steps)


def no_learning(state: State, cohort: Cohort, meta_gradients: Any) -> State:
    """The server learns from adapters alone."""
    return state


def no_report(state: State) -> dict[str, Array]:
    """There is nothing to report."""
    return {}


def same_both_ways(own: Adapter, cohort: list[Adapter]) -> Traffic:
    """The adapter that a client holds travels both ways."""
    return Traffic(up=own, down=own)


class Method(NamedTuple):
    """A federated LoRA method. Hyper-parameters are closed over; everything that learns is in the state.

    Attributes:
      init: ``(key, adapter) -> state`` from a fresh adapter (``lora.new``).
      dispatch: ``(base, state, cohort) -> Dispatch``. Also defines what is evaluated.
      aggregate: ``(base, state, cohort, sent, received) -> state``; ``received`` is the adapters ``[C, ...]``
        after local training.
      penalty: ``(adapter, context) -> scalar`` added to one client's local loss.
      init_client: ``(adapter) -> memory`` of a client that never took part.
      remember: ``(memory, context, sent adapter, received adapter) -> memory``, on one client, after its local steps.
      model: ``(adapter, context) -> adapter`` the model of one client computes with, where that is not what the client
        trains and sends (two models side by side, a factorisation of its own). Defines what is evaluated as well.
      aggregated: ``(carried) -> adapter`` the part of what a client carries (or of its mask) that the server averages,
        where that is not the whole model (``None``): the round's report compares it with the server's model.
      objective: ``(task, adapter, context) -> (minimised, reported)`` losses of one local step, where ``task`` is the
        loss of an adapter as ``model`` gives it (and what it is made of: ``task.Task``); ``None``: both are the loss of
        the model.
      combine: ``(gradients [B, ...], present [B], key) -> gradient`` of one local step, where that is not their mean
        (``None``): each is of the objective of a batch of one example, of what may move (``training.one_by_one``).
      mask_schedule: ``(mask, progress) -> mask`` of one local step, ``progress`` from 0 to below 1: training in phases.
      upload_mask: ``(mask) -> mask`` without the entries that a client trains and does not send; wrappers act on the
        rest.
      held: ``(mask, context, received adapter) -> mask``, on one client, after its local steps: what is shared without
        the entries that it has turned out not to hold (it chose, say, one of several adapters).
      pool: ``(cohort) -> cohort`` whose clients take the local steps, where that is not each on its own data.
      traffic: ``(own, cohort) -> Traffic`` for one client that holds the adapter ``own`` in a cohort whose
        members hold the adapters ``cohort``. What depends on the round is its mean over rounds, or is reported.
      meta_gradient: what clients tell beside their adapters of how their starts should have been different.
      learn: ``(state, cohort, meta_gradients [C, ...]) -> state``, before the aggregation: what the server learns from
        them.
      report: ``(state) -> {name: scalar}``, what is worth knowing of what the server has learned. Those called
        ``travels_up``, ``travels_down`` and ``travels_missed`` are the shares of these parts of ``traffic`` that the
        last round moved, or left behind, where that is not all.
      query: examples that each client keeps apart in a round for ``judge``; 0 where the meta-gradient needs none.
      onboard: how a client that never took part finds its place, where what it holds before does not say; ``None``: it
        needs none.
      always: whether the server moves on even in a round in which nobody is left (noise has to be there whoever is);
        elsewhere its state stays as it was.
      uploads: what the server makes of adapters: it may average them entry by entry (whatever it does besides), only
        stack them as products, or get none. Says which wrappers have a meaning (``fedlora_jax.wrappers.order``).
      stack: names of the wrappers around the method, from the innermost.
    """

    init: Callable[[Array, Adapter], State]
    dispatch: Callable[[Params, State, Cohort], Dispatch]
    aggregate: Callable[[Params, State, Cohort, Dispatch, Adapter], State]
    penalty: Callable[[Adapter, Any], Array] = no_penalty
    init_client: Callable[[Adapter], Memory] = no_memory
    remember: Callable[[Memory, Any, Adapter, Adapter], Memory] = keep_memory
    model: Callable[[Adapter, Any], Adapter] = as_carried
    aggregated: Callable[[Adapter], Adapter] | None = None
    objective: Callable[[Callable[[Adapter], Array], Adapter, Any], tuple[Array, Array]] | None = None
    combine: Callable[[Adapter, Array, Array], Adapter] | None = None
    mask_schedule: Callable[[Adapter, Array], Adapter] = all_along
    upload_mask: Callable[[Adapter], Adapter] = all_of_it
    held: Callable[[Adapter, Any, Adapter], Adapter] = all_held
    pool: Callable[[Cohort], Cohort] = each_alone
    traffic: Callable[[Adapter, list[Adapter]], Traffic] = same_both_ways
    meta_gradient: MetaGradient = no_meta_gradient
    learn: Callable[[State, Cohort, Any], State] = no_learning
    report: Callable[[State], dict[str, Array]] = no_report
    query: int = 0
    onboard: Onboarding | None = None
    always: bool = False
    uploads: Literal["averaged", "stacked", "none"] = "averaged"
    stack: tuple[str, ...] = ()


def models(method: Method, sent: Dispatch) -> Adapter:
    """The adapters ``[C, ...]`` that the models of a dispatch compute with."""
    return jax.vmap(method.model)(sent.adapter, sent.context)


def per_client(values: Array, x: Array) -> Array:
    """``[C]`` as an array of the type of ``x [C, ...]`` that is broadcast against it."""
    return values.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def mean_of_holders(old: Any, stacked: Any, mask: Any, weights: Array) -> Any:
    """The mean of every entry over the clients whose mask holds it, ``[...]``; ``old`` where nobody's does.

    Args:
      old: ``[...]``, one tree; ``stacked``: ``[C, ...]``; ``mask``: 0/1, broadcastable against it.
      weights: ``[C]``, of any sum; among the holders they are scaled to sum to one.
    """

    def one(old: Array, x: Array, m: Array) -> Array:
        held = mean(m.astype(x.dtype), weights)
        return jnp.where(held > 0, mean(x * m, weights) / jnp.where(held > 0, held, 1.0), old)

    return jax.tree.map(one, old, stacked, mask)


def revived(old: Adapter, new: Adapter, ranks: Array, weights: Array) -> Adapter:
    """``new`` whose columns that no client holds continue with the ``a`` of ``old`` and ``b = 0``.

    A mean of factors makes both zero there: the same product, and neither factor would ever have a gradient again.

    Args:
      old, new: adapters without client axis.
      ranks: ``[C]`` columns that each client holds.
      weights: ``[C]``; a client of weight zero holds none.
    """
    most = jnp.where(weights > 0, ranks, 0).max()

    def low_rank(x: LoRA, y: LoRA) -> LoRA:
        held = jnp.arange(y.a.shape[-1]) < most
        return LoRA(jnp.where(held, y.a, x.a), jnp.where(held[:, None], y.b, 0.0), y.scale)

    return lora.tree_map(low_rank, old, new, full=lambda x, y: y)


def uniform(cohort: Cohort) -> Array:
    """``[C]`` equal weights that sum to one, for all clients whose own weight is not zero (such is padding)."""
    present = (cohort.weights > 0).astype(cohort.weights.dtype)
    return present / jnp.maximum(present.sum(), 1.0)


def shares(cohort: Cohort, population: int) -> Array:
    """``[C]`` each client's part of the weight of a population of that many clients; 0 for those that are not there.

    Raises:
      ValueError: the cohort does not say, and is not the whole population.
    """
    if isinstance(cohort.shares, tuple):
        if len(cohort.ids) != population:
            raise ValueError(
                f"the cohort has {len(cohort.ids)} of {population} clients and does not say what part of all weight is "
                "theirs: make it by Population.cohort, or give Cohort(shares=n_c / sum of all n)"
            )
        return cohort.weights / jnp.maximum(cohort.weights.sum(), 1e-12)
    return jnp.where(cohort.weights > 0, cohort.shares, 0.0)


def memory_of(cohort: Cohort) -> Memory:
    """What the clients keep between rounds, for a method that cannot do without.

    Raises:
      ValueError: the cohort has none.
    """
    if isinstance(cohort.memory, tuple) and not cohort.memory:
        raise ValueError(
            "clients of this method keep something between rounds and the cohort's memory is (): start from "
            "rounds.start, which has a row of memory for each client"
        )
    return cohort.memory


def broadcast(base: Params, adapter: Adapter, cohort: Cohort) -> Dispatch:
    """Send one adapter to every client, cut to its rank; everything within the rank may move."""
    mask = lora.rank_mask(adapter, cohort.ranks)
    rows = jax.tree.map(lambda x, m: x * m, adapter, mask)
    return Dispatch(base, rows, mask, context=rows)


def average_client(cohort: Cohort) -> Cohort:
    """A cohort of one client that is nobody in particular: mean signature and memory, every column that there is.

    What a method dispatches to it is the method's global model.
    """
    weights = cohort.weights / jnp.maximum(cohort.weights.sum(), 1e-12)
    one = lambda x: mean(x, weights)[None] if jnp.issubdtype(x.dtype, jnp.floating) else x[:1]
    z = cohort.signatures
    return Cohort(
        ids=jnp.full((1,), -1),
        weights=jnp.ones((1,)),
        ranks=jnp.full(1, jnp.iinfo(cohort.ranks.dtype).max, cohort.ranks.dtype),
        signatures=jax.tree.map(lambda x: x[None], mean_client(z, weights)) if isinstance(z, Signature) else z,
        memory=jax.tree.map(one, cohort.memory),
    )
