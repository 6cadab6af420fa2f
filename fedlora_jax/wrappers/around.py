"""What all wrappers share: a method around another, each with its own part of state, memory and context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from fedlora_jax.lora import Adapter
from fedlora_jax.method import (
    Cohort,
    Dispatch,
    Memory,
    Method,
    Onboarding,
    State,
    all_held,
    no_learning,
)
from fedlora_jax.wrappers import order


class Wrapped(NamedTuple):
    """A state, a client's memory or its context: the inner method's part and the wrapper's own."""

    inner: Any
    own: Any


class AboutWrapper(NamedTuple):
    """One row of the table of wrappers."""

    name: str
    paper: str
    arxiv: str
    does: str


def around(
    name: str,
    inner: Method,
    *,
    init: Callable[[Array, State, Adapter], Any] | None = None,
    init_client: Callable[[Adapter], Any] | None = None,
    client_context: Callable[[Any, Cohort, Dispatch], Any] | None = None,
    penalty: Callable[[Adapter, Any], Array] | None = None,
    training_model: Callable[[Adapter, Any], Adapter] | None = None,
    client_model: Callable[[Adapter, Any], Adapter] | None = None,
    remember: Callable[[Any, Any, Adapter, Adapter], Any] | None = None,
    upload: Callable[[Any, Adapter, Adapter, Adapter], Adapter] | None = None,
    receive: Callable[[Any, Cohort, Dispatch, Adapter], tuple[Array, Adapter]] | None = None,
    finish: Callable[[Wrapped, State, Cohort, Dispatch, Adapter], tuple[State, Any]] | None = None,
    report: Callable[[Any], dict[str, Array]] | None = None,
) -> Method:
    """``inner`` with something around it. Every function sees the wrapper's own part of memory and context only.

    Args:
      name: of the wrapper, by which ``order`` knows it.
      inner: the method.
      init: ``(key, inner state, adapter) -> own state``.
      init_client: ``(adapter) -> own memory`` of a client that never took part.
      client_context: ``(own state, cohort, sent) -> own context [C, ...]``; the mask in ``sent`` is that of what$
        share.
      penalty: ``(adapter, own context) -> scalar``, on top of the inner one.
      training_model: ``(model, own context) -> model`` that the loss is computed with in training, and nowhere else.
      client_model: ``(model, own context) -> model`` that a client computes with always; needs ``client_context``, and
        what it adds does not travel back.
      remember: ``(own memory, own context, sent adapter, received adapter) -> own memory``.
      upload: ``(own context, mask, sent adapter, received adapter) -> received`` of one client, with the mask of what
        it shares and holds: what the inner aggregation is given, and what wrappers inside remember by, since a client
        knows what it does to its own.
      receive: ``(own state, cohort, sent, received) -> (weights [C], received)`` that the inner aggregation is given,
        where that depends on who else is there. The mask in ``sent`` is that of what clients share and hold.
      finish: ``(old state, new inner state, cohort, sent, received) -> (inner state, own state)`` after it, with what
        clients sent to this wrapper (before ``upload`` and ``receive``).
      report: ``(own state) -> {name: scalar}``.

    Raises:
      ValueError: this wrapper has no meaning around this method or around a wrapper that is around it.
    """
    order.check(name, inner.stack, inner.uploads)
    has_state, has_memory = init is not None, init_client is not None
    has_context = client_context is not None or upload is not None
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

    def only_uploads(sent: Dispatch, context: Any) -> Dispatch:
        return sent._replace(mask=inner.upload_mask(sent.mask), context=context)

    def own_context(own: Any, cohort: Cohort, sent: Dispatch) -> Any:
        own = client_context(own, cohort, sent) if client_context else ()
        return (sent.mask, own) if upload else own

    def uploaded(context: Wrapped, sent: Adapter, received: Adapter) -> Adapter:
        mask, own = context.own
        return upload(own, inner.held(mask, context.inner, received), sent, received) if upload else received

    def held(mask, context, received):
        return inner.held(mask, parts(context, has_context).inner, received)

    def init_both(key, adapter):
        state = inner.init(key, adapter)
        own = init(jax.random.fold_in(key, 1 + _depth(state)), state, adapter) if init else ()
        return whole(state, own, has_state)

    def dispatch(base, state, cohort):
        (theirs, mine), state = memories(cohort), parts(state, has_state)
        sent = inner.dispatch(base, state.inner, theirs)
        own = own_context(state.own, mine, only_uploads(sent, ()))
        return sent._replace(context=whole(sent.context, own, has_context))

    def aggregate(base, state, cohort, sent, received):
        (theirs, mine), state, context = memories(cohort), parts(state, has_state), parts(sent.context, has_context)
        ours = only_uploads(sent, context.own)
        if inner.held is not all_held:
            ours = ours._replace(mask=jax.vmap(inner.held)(ours.mask, context.inner, received))
        weights, uploads = receive(state.own, mine, ours, received) if receive else (cohort.weights, received)
        uploads = jax.vmap(uploaded)(context, sent.adapter, uploads) if upload else uploads
        theirs, sent = theirs._replace(weights=weights), sent._replace(context=context.inner)
        new, own = inner.aggregate(base, state.inner, theirs, sent, uploads), state.own
        if finish:
            new, own = finish(Wrapped(*state), new, mine, ours, received)
        return whole(new, own, has_state)

    def remember_both(memory, context, sent, received):
        memory, context = parts(memory, has_memory), parts(context, has_context)
        own = remember(memory.own, context.own, sent, received) if remember else memory.own
        theirs = inner.remember(memory.inner, context.inner, sent, received)
        if upload:
            by = inner.remember(memory.inner, context.inner, sent, uploaded(context, sent, received))
            theirs = _as_sent(theirs, by)
        return whole(theirs, own, has_memory)

    def penalties(adapter, context):
        context = parts(context, has_context)
        theirs = inner.penalty(adapter, context.inner)
        return theirs + penalty(adapter, context.own) if penalty else theirs

    def objective(task, adapter, context):
        context = parts(context, has_context)
        shown = lambda model: client_model(model, context.own) if client_model else model
        seen = lambda model: task(training_model(shown(model), context.own) if training_model else shown(model))
        if inner.objective is not None:
            return inner.objective(seen, adapter, context.inner)
        loss = seen(inner.model(adapter, context.inner))
        return loss, loss

    def model(adapter, context):
        context = parts(context, has_context)
        theirs = inner.model(adapter, context.inner)
        return client_model(theirs, context.own) if client_model else theirs

    def learn(state, cohort, meta_gradients):
        (theirs, _), state = memories(cohort), parts(state, has_state)
        return whole(inner.learn(state.inner, theirs, meta_gradients), state.own, has_state)

    def report_both(state):
        state = parts(state, has_state)
        return inner.report(state.inner) | (report(state.own) if report else {})

    def onboard(trial: Onboarding) -> Onboarding:
        def start(state):
            state = parts(state, has_state)
            return whole(trial.start(state.inner), state.own, has_state)

        def place(state, memory, sent, received):
            theirs, memory = parts(state, has_state).inner, parts(memory, has_memory)
            return whole(trial.place(theirs, memory.inner, sent, received), memory.own, has_memory)

        return Onboarding(start, place)

    if has_context or penalty:
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
        held=inner.held if inner.held is all_held else held,
        model=own_model,
        objective=objective if training_model or (inner.objective is not None and has_context) else inner.objective,
        learn=no_learning if inner.learn is no_learning else learn,
        report=report_both,
        onboard=None if inner.onboard is None else onboard(inner.onboard),
        stack=(*inner.stack, name),
    )


def _as_sent(kept: Memory, by_upload: Memory) -> Memory:
    """What a method keeps of what it trained, and wrappers around it of what was sent."""
    if isinstance(kept, Wrapped):
        return Wrapped(_as_sent(kept.inner, by_upload.inner), by_upload.own)
    return kept


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
