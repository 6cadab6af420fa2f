"""What all wrappers share: a method around another, each with its own part of state, memory and anchor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Cohort, Dispatch, Meet, Method, State, no_learning, per_client
from fedlora_jax.signatures import Signature


class Wrapped(NamedTuple):
    """A state, a client's memory or its anchor: the inner method's part and the wrapper's own."""

    inner: Any
    own: Any


class AboutWrapper(NamedTuple):
    """One row of the table of wrappers."""

    name: str
    paper: str
    arxiv: str
    does: str


def around(
    inner: Method,
    *,
    init: Callable[[Array, State, Adapter], Any] | None = None,
    init_client: Callable[[Adapter], Any] | None = None,
    tell: Callable[[Any, Cohort, Dispatch], Any] | None = None,
    penalty: Callable[[Adapter, Any], Array] | None = None,
    see: Callable[[Adapter, Any], Adapter] | None = None,
    beside: Callable[[Adapter, Any], Adapter] | None = None,
    remember: Callable[[Any, Any, Adapter, Adapter], Any] | None = None,
    receive: Callable[[Any, Cohort, Dispatch, Adapter], tuple[Array, Adapter]] | None = None,
    finish: Callable[[Wrapped, State, Cohort, Dispatch, Adapter], tuple[State, Any]] | None = None,
    report: Callable[[Any], dict[str, Array]] | None = None,
) -> Method:
    """``inner`` with something around it. Every function sees the wrapper's own part of memory and anchor only.

    Args:
      inner: the method.
      init: ``(key, inner state, adapter) -> own state``.
      init_client: ``(adapter) -> own memory`` of a client that never took part.
      tell: ``(own state, cohort, sent) -> own anchor [C, ...]``; the mask in ``sent`` is that of what clients share.
      penalty: ``(adapter, own anchor) -> scalar``, on top of the inner one.
      see: ``(model, own anchor) -> model`` that the loss is computed with in training, and nowhere else.
      beside: ``(model, own anchor) -> model`` that a client computes with always; needs ``tell``, and what it
        adds does not travel back.
      remember: ``(own memory, own anchor, sent adapter, received adapter) -> own memory``.
      receive: ``(own state, cohort, sent, received) -> (weights [C], received)`` that the inner aggregation is given.
      finish: ``(old state, new inner state, cohort, sent, received) -> (inner state, own state)`` after it, with what
        clients sent to this wrapper (before ``receive``).
      report: ``(own state) -> {name: scalar}``.
    """
    has_state, has_memory, has_anchor = init is not None, init_client is not None, tell is not None
    parts = lambda x, has: x if has else Wrapped(x, ())
    whole = lambda inner, own, has: Wrapped(inner, own) if has else inner

    def memories(cohort: Cohort) -> tuple[Cohort, Cohort]:
        if has_memory and not isinstance(cohort.memory, Wrapped):
            raise ValueError(
                f"clients of this wrapper keep something between rounds, the cohort's memory is "
                f"{type(cohort.memory).__name__}: start from rounds.start, which has a row of memory for each client"
            )
        memory = parts(cohort.memory, has_memory)
        return cohort._replace(memory=memory.inner), cohort._replace(memory=memory.own)

    def shared(sent: Dispatch, anchor: Any) -> Dispatch:
        return sent._replace(mask=inner.shared(sent.mask), anchor=anchor)

    def init_both(key, adapter):
        state = inner.init(key, adapter)
        own = init(jax.random.fold_in(key, 1 + _depth(state)), state, adapter) if init else ()
        return whole(state, own, has_state)

    def dispatch(base, state, cohort):
        (theirs, mine), state = memories(cohort), parts(state, has_state)
        sent = inner.dispatch(base, state.inner, theirs)
        own = tell(state.own, mine, shared(sent, ())) if tell else ()
        return sent._replace(anchor=whole(sent.anchor, own, has_anchor))

    def aggregate(base, state, cohort, sent, received):
        (theirs, mine), state, anchor = memories(cohort), parts(state, has_state), parts(sent.anchor, has_anchor)
        ours = shared(sent, anchor.own)
        weights, uploads = receive(state.own, mine, ours, received) if receive else (cohort.weights, received)
        theirs, sent = theirs._replace(weights=weights), sent._replace(anchor=anchor.inner)
        new, own = inner.aggregate(base, state.inner, theirs, sent, uploads), state.own
        if finish:
            new, own = finish(Wrapped(*state), new, mine, ours, received)
        return whole(new, own, has_state)

    def remember_both(memory, anchor, sent, received):
        memory, anchor = parts(memory, has_memory), parts(anchor, has_anchor)
        own = remember(memory.own, anchor.own, sent, received) if remember else memory.own
        return whole(inner.remember(memory.inner, anchor.inner, sent, received), own, has_memory)

    def penalties(adapter, anchor):
        anchor = parts(anchor, has_anchor)
        theirs = inner.penalty(adapter, anchor.inner)
        return theirs + penalty(adapter, anchor.own) if penalty else theirs

    def objective(task, adapter, anchor):
        anchor = parts(anchor, has_anchor)
        shown = lambda model: beside(model, anchor.own) if beside else model
        seen = lambda model: task(see(shown(model), anchor.own) if see else shown(model))
        if inner.objective is not None:
            return inner.objective(seen, adapter, anchor.inner)
        loss = seen(inner.model(adapter, anchor.inner))
        return loss, loss

    def model(adapter, anchor):
        anchor = parts(anchor, has_anchor)
        theirs = inner.model(adapter, anchor.inner)
        return beside(theirs, anchor.own) if beside else theirs

    def learn(state, cohort, slopes):
        (theirs, _), state = memories(cohort), parts(state, has_state)
        return whole(inner.learn(state.inner, theirs, slopes), state.own, has_state)

    def report_both(state):
        state = parts(state, has_state)
        return inner.report(state.inner) | (report(state.own) if report else {})

    def meet(trial: Meet) -> Meet:
        def start(state):
            state = parts(state, has_state)
            return whole(trial.start(state.inner), state.own, has_state)

        def place(state, memory, received):
            memory = parts(memory, has_memory)
            return whole(trial.place(parts(state, has_state).inner, memory.inner, received), memory.own, has_memory)

        return Meet(start, place)

    if has_anchor or penalty:
        own_model, own_penalty = model, penalties
    else:
        own_model, own_penalty = inner.model, inner.penalty
    return inner._replace(
        init=init_both if has_state else inner.init,
        dispatch=dispatch,
        aggregate=aggregate,
        penalty=own_penalty,
        init_client=(lambda x: Wrapped(inner.init_client(x), init_client(x))) if init_client else inner.init_client,
        remember=remember_both,
        model=own_model,
        objective=objective if see or (inner.objective is not None and has_anchor) else inner.objective,
        learn=no_learning if inner.learn is no_learning else learn,
        report=report_both,
        meet=None if inner.meet is None else meet(inner.meet),
    )


def innermost(state: State) -> State:
    """The state of the method that all wrappers are around."""
    return innermost(state.inner) if isinstance(state, Wrapped) else state


def _depth(state: State) -> int:
    return 1 + _depth(state.inner) if isinstance(state, Wrapped) else 0


def with_adapter(state: State, adapter: Adapter) -> State:
    """The same state with another global adapter."""
    if isinstance(state, Wrapped):
        return state._replace(inner=with_adapter(state.inner, adapter))
    return state._replace(adapter=adapter)


def needs_an_adapter(wrapper: str, state: State) -> Adapter:
    """The global adapter of a method, if that is where all that it learned is.

    Raises:
      ValueError: it has none, or keeps a residual on the base besides.
    """
    state = innermost(state)
    if not hasattr(state, "adapter") or hasattr(state, "residual"):
        why = "keeps a residual on the base" if hasattr(state, "residual") else "has no global adapter"
        raise ValueError(
            f"{wrapper} keeps something in the coordinates of the server's adapter, and a method with "
            f"{type(state).__name__} {why}: wrap one whose server holds one adapter, such as fedit or flexlora"
        )
    return state.adapter


def class_bias(wrapper: str, model: Adapter, classes: int) -> str:
    """The name of the head's bias.

    Raises:
      ValueError: there is not exactly one bias of that many classes that is trained in full.
    """
    flat = lora.flatten(model)
    names = [k for k, x in flat.items() if not lora.is_lora(x) and x.shape == (classes,) and k.endswith("bias")]
    if len(names) != 1:
        raise ValueError(
            f"{wrapper} shifts the bias of the {classes} classes, trained in full; the adapter has "
            f"{', '.join(names) or 'none'}: add the head's bias to full in lora.new"
        )
    return names[0]


def tells_of_labels(wrapper: str, signatures: Any) -> Signature:
    """The signatures, if they say what a client's labels are.

    Raises:
      ValueError: they do not.
    """
    if not isinstance(signatures, Signature) or signatures.labels.shape[-1] == 0:
        raise ValueError(
            f"{wrapper} needs to know how many examples of each class a client holds, and its signature says nothing "
            "of labels: use full signatures (fedlora_jax.signatures), or another wrapper"
        )
    return signatures


def needs_plain_uploads(wrapper: str, inner: Method) -> None:
    """Refuse a method that learns from what clients send beside their adapters."""
    if inner.learn is not no_learning:
        raise ValueError(
            f"{wrapper} acts on the adapters that clients send, and this method also learns from slopes, which it "
            "would not reach: wrap a method that aggregates adapters only, such as fedit"
        )


def present(cohort: Cohort) -> Array:
    """``[C]`` 1 for a client that takes part, 0 where the weight is zero."""
    return (cohort.weights > 0).astype(cohort.weights.dtype)


def where_moved(inner: Method, cohort: Cohort, sent: Dispatch, new: Adapter, old: Adapter) -> Adapter:
    """``new`` where any client that takes part may move an entry that it shares, ``old`` elsewhere; both ``[...]``."""
    mask = inner.told(sent.mask) if inner.told else sent.mask
    by_any = lambda m: ((m > 0) & (per_client(cohort.weights > 0, m) > 0)).any(0)
    return jax.tree.map(lambda m, x, y: jnp.where(by_any(m), x, y), mask, new, old)


def updates(sent: Dispatch, received: Adapter) -> Adapter:
    """What clients changed of what they share, ``[C, ...]``."""
    return jax.tree.map(lambda x, y, m: (y - x) * m.astype(x.dtype), sent.adapter, received, sent.mask)


def replaced(sent: Dispatch, received: Adapter, updates: Adapter) -> Adapter:
    """The uploads whose shared entries are those sent, changed by ``updates``; what is not shared stays."""
    new = lambda x, y, m, d: jnp.where(m > 0, x + d, y)
    return jax.tree.map(new, sent.adapter, received, sent.mask, updates)


def square_norms(stacked: Adapter) -> Array:
    """``[C]`` squared norms over all arrays together."""
    return sum((jnp.sum(x**2, tuple(range(1, x.ndim))) for x in jax.tree.leaves(stacked)), jnp.zeros(()))


def same_structure(wrapper: str, mine: Adapter, *theirs: Adapter) -> None:
    """Refuse a method whose clients carry or keep something else than an adapter like the server's."""
    if any(jax.tree.structure(mine) != jax.tree.structure(x) for x in theirs):
        raise ValueError(
            f"{wrapper} keeps a number for every entry of the server's adapter, and clients of this method carry a "
            "tree of another structure: wrap a method whose clients carry one adapter, such as fedit"
        )
