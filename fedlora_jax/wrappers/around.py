"""A method with something around it, each with its own part of state, memory and context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from fedlora_jax.lora import Adapter
from fedlora_jax.method import Cohort, Dispatch, Memory, Method, Onboarding, State, all_held, no_learning
from fedlora_jax.task import Task, of_model
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
    tells: str = "-"  # what the server learns of a client beside its upload, its weight and what the method is told


class Wrapper(NamedTuple):
    """What is put around a method. Every function sees the wrapper's own part of memory and context only.

    Attributes:
      name: by which ``order`` knows it.
      init: ``(key, inner state, adapter) -> own state``.
      init_client: ``(adapter) -> own memory`` of a client that never took part.
      client_context: ``(own state, cohort, sent) -> own context [C, ...]``; the mask in ``sent`` is that of what
        clients share.
      penalty: ``(adapter, own context) -> scalar``, on top of the inner one.
      training_model: ``(model, own context) -> model`` that the loss is computed with in training, and nowhere else.
      training_loss: ``(task, model, own context) -> scalar`` in training, in place of ``task(model)``; ``task`` is a
        ``fedlora_jax.task.Task``, which shows features, logits and labels of the batch where the loss does.
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
      always: as ``Method.always``.
    """

    name: str
    init: Callable[[Array, State, Adapter], Any] | None = None
    init_client: Callable[[Adapter], Any] | None = None
    client_context: Callable[[Any, Cohort, Dispatch], Any] | None = None
    penalty: Callable[[Adapter, Any], Array] | None = None
    training_model: Callable[[Adapter, Any], Adapter] | None = None
    training_loss: Callable[[Task, Adapter, Any], Array] | None = None
    client_model: Callable[[Adapter, Any], Adapter] | None = None
    remember: Callable[[Any, Any, Adapter, Adapter], Any] | None = None
    upload: Callable[[Any, Adapter, Adapter, Adapter], Adapter] | None = None
    receive: Callable[[Any, Cohort, Dispatch, Adapter], tuple[Array, Adapter]] | None = None
    finish: Callable[[Wrapped, State, Cohort, Dispatch, Adapter], tuple[State, Any]] | None = None
    report: Callable[[Any], dict[str, Array]] | None = None
    always: bool = False

    @property
    def has_context(self) -> bool:
        """Whether clients are sent something for it."""
        return self.client_context is not None or self.upload is not None


def around(inner: Method, own: Wrapper) -> Method:
    """``inner`` with ``own`` around it.

    Raises:
      ValueError: this wrapper has no meaning around this method or around a wrapper that is around it.
    """
    order.check(own.name, inner.stack, inner.uploads)
    both, trial = lambda f: partial(f, inner, own), inner.onboard
    on_clients = own.has_context or own.penalty is not None
    other_objective = own.training_model or own.training_loss or (inner.objective and own.has_context)
    return inner._replace(
        init=both(_init) if own.init else inner.init,
        dispatch=both(_dispatch),
        aggregate=both(_aggregate),
        penalty=both(_penalty) if on_clients else inner.penalty,
        init_client=both(_init_client) if own.init_client else inner.init_client,
        remember=both(_remember),
        held=inner.held if inner.held is all_held else both(_held),
        model=both(_model) if on_clients else inner.model,
        objective=both(_objective) if other_objective else inner.objective,
        learn=no_learning if inner.learn is no_learning else both(_learn),
        report=both(_report),
        always=inner.always or own.always,
        onboard=Onboarding(partial(_start, trial, own), partial(_place, trial, own)) if trial else None,
        stack=(*inner.stack, own.name),
    )


def _parts(x: Any, has: Any) -> Wrapped:
    """The inner method's part and the wrapper's own; ``has``: the hook that makes it have one."""
    return x if has else Wrapped(x, ())


def _whole(inner: Any, own: Any, has: Any) -> Any:
    return Wrapped(inner, own) if has else inner


def _memories(own: Wrapper, cohort: Cohort) -> tuple[Cohort, Cohort]:
    if own.init_client and not isinstance(cohort.memory, Wrapped):
        raise ValueError(
            f"clients of this wrapper keep something between rounds, the cohort's memory is "
            f"{type(cohort.memory).__name__}: start from rounds.start, which has a row of memory for each client"
        )
    memory = _parts(cohort.memory, own.init_client)
    return cohort._replace(memory=memory.inner), cohort._replace(memory=memory.own)


def _only_uploads(inner: Method, sent: Dispatch, context: Any) -> Dispatch:
    return sent._replace(mask=inner.upload_mask(sent.mask), context=context)


def _uploaded(inner: Method, own: Wrapper, context: Wrapped, sent: Adapter, received: Adapter) -> Adapter:
    if not own.upload:
        return received
    mask, mine = context.own
    return own.upload(mine, inner.held(mask, context.inner, received), sent, received)


def _init(inner: Method, own: Wrapper, key, adapter):
    state = inner.init(key, adapter)
    mine = own.init(jax.random.fold_in(key, 1 + _depth(state)), state, adapter) if own.init else ()
    return _whole(state, mine, own.init)


def _init_client(inner: Method, own: Wrapper, adapter):
    return _whole(inner.init_client(adapter), own.init_client and own.init_client(adapter), own.init_client)


def _dispatch(inner: Method, own: Wrapper, base, state, cohort):
    (theirs, mine), state = _memories(own, cohort), _parts(state, own.init)
    sent = inner.dispatch(base, state.inner, theirs)
    shared = _only_uploads(inner, sent, ())
    context = own.client_context(state.own, mine, shared) if own.client_context else ()
    context = (shared.mask, context) if own.upload else context
    return sent._replace(context=_whole(sent.context, context, own.has_context))


def _aggregate(inner: Method, own: Wrapper, base, state, cohort, sent, received):
    (theirs, mine), state = _memories(own, cohort), _parts(state, own.init)
    context = _parts(sent.context, own.has_context)
    ours = _only_uploads(inner, sent, context.own)
    if inner.held is not all_held:
        ours = ours._replace(mask=jax.vmap(inner.held)(ours.mask, context.inner, received))
    weights, uploads = own.receive(state.own, mine, ours, received) if own.receive else (cohort.weights, received)
    uploads = jax.vmap(partial(_uploaded, inner, own))(context, sent.adapter, uploads) if own.upload else uploads
    theirs, sent = theirs._replace(weights=weights), sent._replace(context=context.inner)
    new, kept = inner.aggregate(base, state.inner, theirs, sent, uploads), state.own
    if own.finish:
        new, kept = own.finish(state, new, mine, ours, received)
    return _whole(new, kept, own.init)


def _remember(inner: Method, own: Wrapper, memory, context, sent, received):
    memory, context = _parts(memory, own.init_client), _parts(context, own.has_context)
    mine = own.remember(memory.own, context.own, sent, received) if own.remember else memory.own
    theirs = inner.remember(memory.inner, context.inner, sent, received)
    if own.upload:
        uploaded = _uploaded(inner, own, context, sent, received)
        theirs = _as_sent(theirs, inner.remember(memory.inner, context.inner, sent, uploaded))
    return _whole(theirs, mine, own.init_client)


def _held(inner: Method, own: Wrapper, mask, context, received):
    return inner.held(mask, _parts(context, own.has_context).inner, received)


def _penalty(inner: Method, own: Wrapper, adapter, context):
    context = _parts(context, own.has_context)
    theirs = inner.penalty(adapter, context.inner)
    return theirs + own.penalty(adapter, context.own) if own.penalty else theirs


def _model(inner: Method, own: Wrapper, adapter, context):
    context = _parts(context, own.has_context)
    return _shown(own, inner.model(adapter, context.inner), context.own)


def _shown(own: Wrapper, model: Adapter, context: Any) -> Adapter:
    return own.client_model(model, context) if own.client_model else model


def _objective(inner: Method, own: Wrapper, task, adapter, context):
    context = _parts(context, own.has_context)

    def shown(model: Adapter) -> Adapter:
        model = _shown(own, model, context.own)
        return own.training_model(model, context.own) if own.training_model else model

    inside = of_model(task, shown)
    if own.training_loss:
        plain, loss_of = inside, own.training_loss
        inside = Task(lambda model: loss_of(plain, model, context.own), plain.seen)
    if inner.objective is not None:
        return inner.objective(inside, adapter, context.inner)
    loss = inside(inner.model(adapter, context.inner))
    return loss, loss


def _learn(inner: Method, own: Wrapper, state, cohort, meta_gradients):
    (theirs, _), state = _memories(own, cohort), _parts(state, own.init)
    return _whole(inner.learn(state.inner, theirs, meta_gradients), state.own, own.init)


def _report(inner: Method, own: Wrapper, state):
    state = _parts(state, own.init)
    return inner.report(state.inner) | (own.report(state.own) if own.report else {})


def _start(trial: Onboarding, own: Wrapper, state):
    state = _parts(state, own.init)
    return _whole(trial.start(state.inner), state.own, own.init)


def _place(trial: Onboarding, own: Wrapper, state, memory, sent, received):
    memory = _parts(memory, own.init_client)
    placed = trial.place(_parts(state, own.init).inner, memory.inner, sent, received)
    return _whole(placed, memory.own, own.init_client)


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
