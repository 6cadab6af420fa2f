"""How models are served and scored: the one path, in every command, whatever it then reports."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from experiments.config import Config
from experiments.engine.chunking import divisor, mesh_of_clients
from experiments.results import client_map
from experiments.setup.problem import Arrays, Clients, Problem, Seed, own_accuracy
from fedlora_jax import clustering, lora, rounds
from fedlora_jax.batches import Padded
from fedlora_jax.clients import sample_batches
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import Cohort, Dispatch, Method, average_client
from fedlora_jax.rounds import Run
from fedlora_jax.task import on_batches

GROUP = 256  # clients that hold a model at a time when they are scored


class Scores(NamedTuple):
    """Accuracies after a block of rounds; clients are those that are scored, ``E``: training ones, then unseen ones."""

    correct: Array  # [n_test] 1 where the global model is right
    personal: Array  # [E] each client's model, as dispatched, on the client's own test images; of unseen clients
    #   after the trial by which the method gets to know them, where it has one (Method.onboard)
    tuned: Array  # [E] the same after local steps; nan where they were not asked for
    distances: Array | None  # [E, E] distances of their subspaces after the last round and local steps; or nan;
    #   None where there are too many for a map
    sides: Any = ()  # [E, 2] each client's model, as dispatched, on all test images of classes that are trained on, and
    #   of novel ones; () where there are none
    tuned_sides: Any = ()  # [E, 2] the same after local steps; nan where they were not asked for
    opened: Any = ()  # [n_test] 1 where the global model takes an image with the trigger for its target; () without one


class Serving(NamedTuple):
    """How the clients that are scored, ``E``, are served the models of a run; of one seed."""

    whole: Callable  # (arrays, seed, run, nobody=None) -> [n_test] 1 where the global model is right; of the mean of
    #   all clients that train, or of what ``nobody`` made of them
    nobody: Callable  # (seed, run) -> that mean, a cohort of one
    # (arrays, seed, run) -> memory [E, ...], of unseen clients after the trial by which the method gets to know
    # them, where it has one (Method.onboard)
    onboard: Callable
    strangers: Callable  # the same of the unseen clients alone, for which no other's memory is looked at
    score: Callable  # (arrays, seed, run, memory, steps, read) -> (accuracy [E] of each client's model on its own
    #   test images after so many local steps, read(base, model) [E, ...])
    part: Callable  # (arrays, seed, run, own, steps, read, ids [G], places [C]) -> score of those at ids[places] of E,
    #   where models are dispatched to all of ids at once, of whom own [G, ...] is the memory
    draws: Callable  # (clients, key of a seed, round) -> rows of the training images that are drawn for all that in
    #   that round: for trials [unseen, steps, batch], and for local steps [E, steps, batch]


def make_serving(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int) -> Serving:
    """The one way in which models are served and scored: in every run, whatever it then reports.

    Clients are shared by devices and scored in chunks of at most ``chunk``, as they are trained. Of many clients no
    more than ``GROUP`` hold a model at a time; images are looked up where they are used.
    """
    n, strange = config.scored
    total = n + strange
    longest = problem.longest or config.local_steps
    many, own_chunk, mesh = total > GROUP, scored_at_once(total, chunk, config.sharing), mesh_of_clients(config)
    score_one = rounds.make_evaluate(method, problem.correct_fn)
    key_at = lambda key, round: partial(purpose, purpose(jax.random.fold_in(key, round), "evaluation"))
    key_of = lambda seed, run: key_at(seed.key, run.round)

    loss_of, drawn = partial(loss_of_rows, problem), partial(rows_of_steps, config.batch, problem.smallest)
    nobody = lambda seed, run: average_client(everybody_trained(config, seed, run))

    def whole(arrays: Arrays, seed: Seed, run: Run, one: Cohort | None = None) -> Array:
        (x, y), one = arrays.test, nobody(seed, run) if one is None else one
        key = key_of(seed, run)("nothing")
        return score_one(arrays.base, run.state, one, (x[None], y[None]), key).before[0]

    def strangers(arrays: Arrays, seed: Seed, run: Run) -> Any:
        key = key_of(seed, run)
        fresh = rounds.start(method, key("newcomers"), seed.adapter, strange).memory
        if method.onboard is None or not strange:
            return fresh
        unseen = jnp.arange(n, total)
        trial = drawn(arrays, seed.clients, unseen, key("batches of trials"), longest)
        own = divisor(-(-strange // config.sharing), chunk)
        introduce = rounds.make_onboard(method, loss_of(arrays), optimizer, chunk=own, mesh=mesh)
        cohort = cohort_of(seed.clients, fresh, unseen, trial)
        return introduce(arrays.base, run.state, cohort, key("trials"), run.round)

    def onboard(arrays: Arrays, seed: Seed, run: Run) -> Any:
        trained = run.memory
        if n < config.clients:
            trained = jax.tree.map(lambda x: x[seed.clients.who(jnp.arange(n))], trained)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), trained, strangers(arrays, seed, run))

    def serve(arrays: Arrays, seed: Seed, run: Run, steps: int, read: Callable) -> Callable:
        key, clients = key_of(seed, run), seed.clients
        test = lambda rows: jax.tree.map(partial(looked_up, rows), arrays.test)
        metric = lambda base, model, rows: (problem.correct_fn(base, model, test(rows)), read(base, model))

        def group(ids: Array, own: Any, method: Method = method) -> tuple[Array, Any]:
            evaluate = rounds.make_evaluate(method, metric, loss_of(arrays), optimizer, chunk=own_chunk, mesh=mesh)
            batches = drawn(arrays, clients, ids, key("batches"), steps) if steps else ()
            cohort, who = cohort_of(clients, own, ids, batches), clients.who(ids)
            scores = evaluate(arrays.base, run.state, cohort, clients.test_rows[who], key("steps"), run.round)
            correct, seen = scores.after if steps else scores.before
            return own_accuracy(correct, clients.test_counts[who]), seen

        return group

    def score(arrays: Arrays, seed: Seed, run: Run, memory: Any, steps: int, read: Callable = nothing):
        group = serve(arrays, seed, run, steps, read)
        if not many:
            return group(jnp.arange(total), memory)
        of_group = lambda ids: group(ids, jax.tree.map(lambda x: x[ids], memory))
        out = jax.lax.map(of_group, together(total, own_chunk * config.sharing))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], out)

    def part(arrays: Arrays, seed: Seed, run: Run, own: Any, steps: int, read: Callable, ids: Array, places: Array):
        others = among(method, cohort_of(seed.clients, own, ids), places)
        own = jax.tree.map(lambda x: x[places], own)
        return serve(arrays, seed, run, steps, read)(ids[places], own, others)

    def draws(clients: Clients, key: Array, round: Array) -> tuple[Array, Array]:
        numbers, named = (jnp.arange(len(problem.train[1])),) * 2, key_at(key, round)
        own = lambda ids, name: drawn(Arrays((), numbers, ()), clients, ids, named(name), longest)  # type: ignore
        return own(jnp.arange(n, total), "batches of trials"), own(jnp.arange(total), "batches")

    return Serving(whole, nobody, onboard, strangers, score, part, draws)


def rows_of_steps(
    batch: int, smallest: int, arrays: Arrays, clients: Clients, places: Array, key: Array, steps: int
) -> Any:
    """Rows of the training images of so many local steps, ``[C, steps, batch]``; padded where some take fewer."""
    rows, ids = jnp.arange(arrays.train[1].shape[0]), clients.who(places)
    return sample_batches(key, rows, clients.population, ids, steps, batch, smallest)


def loss_of_rows(problem: Problem, arrays: Arrays) -> Callable:
    """The loss of batches of rows of the training images, which are looked up where they are used."""

    def images(rows: Any) -> Any:
        if isinstance(rows, Padded):
            return rows._replace(examples=images(rows.examples))
        return jax.tree.map(partial(looked_up, rows), arrays.train)

    return on_batches(problem.loss_fn, images)


def looked_up(rows: Array, x: Array) -> Array:
    """``x[rows]``, also of an array that every device has where each asks for rows of its own."""
    return jnp.take(x, rows, axis=0, mode="clip")


def everybody_trained(config: Config, seed: Seed, run: Run) -> Cohort:
    """All clients that train, with what they keep."""
    return seed.clients.training(config.clients).cohort(jnp.arange(config.clients), run.memory)


def cohort_of(clients: Clients, own: Any, places: Array, batches: Any = ()) -> Cohort:
    """The clients at some places among those that are scored, with what they keep, ``own [C, ...]``."""
    return clients.population.cohort(clients.who(places), (), batches)._replace(memory=own)


def among(method: Method, everybody: Cohort, places: Array) -> Method:
    """The method for those of a cohort who are at some places in it, with models dispatched to the whole cohort."""

    def dispatch(base: Params, state: Any, cohort: Cohort) -> Dispatch:
        sent = method.dispatch(base, state, everybody)
        return jax.tree.map(lambda x: x[places], sent._replace(base=()))._replace(base=sent.base)

    return method._replace(dispatch=dispatch)


def make_scores(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int) -> Callable:
    """``(arrays, seed, run, tune) -> Scores`` of one seed; tune: also after local steps?"""
    total = sum(config.scored)
    serving = make_serving(config, problem, method, optimizer, chunk)
    mapped, known = is_mapped(config, problem), problem.images.known
    trigger = problem.attack.trigger
    marked = lambda x, y: (trigger(x), jnp.full_like(y, problem.attack.target))

    def scores(arrays: Arrays, seed: Seed, run: Run, tune: Array) -> Scores:
        memory = serving.onboard(arrays, seed, run)
        on_sides = nothing if known is None else partial(accuracy_on_sides, problem.correct_fn, arrays.test, known)

        def tuned() -> tuple[Array, Array | None, Any]:
            spanned = subspaces if mapped else nothing
            read = lambda base, model: (spanned(base, model), on_sides(base, model))
            steps = problem.longest or config.local_steps
            accuracy, (q, sides) = serving.score(arrays, seed, run, memory, steps, read)
            if not mapped:
                return accuracy, None, sides
            nowhere = jnp.full((total, total), jnp.nan)
            last = run.round == config.rounds
            return accuracy, jax.lax.cond(last, lambda: clustering.distances(q, q), lambda: nowhere), sides

        personal, sides = serving.score(arrays, seed, run, memory, 0, on_sides)
        none = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(tuned))
        after, distances, tuned_sides = jax.lax.cond(tune, tuned, lambda: none)
        whole = serving.whole(arrays, seed, run)
        opened = () if trigger is None else serving.whole(arrays._replace(test=marked(*arrays.test)), seed, run)
        return Scores(whole, personal, after, distances, sides, tuned_sides, opened)

    return scores


def together(total: int, own_chunk: int) -> Array:
    """``[groups, size]``: clients to whom models are dispatched at once, where devices score ``own_chunk`` at once.

    Of many no more than ``GROUP``, in equal groups, the last filled up.
    """
    if total <= GROUP:
        return jnp.arange(total)[None]
    groups = -(-total // (GROUP // own_chunk * own_chunk))
    size = -(-total // (groups * own_chunk)) * own_chunk  # of equal groups: the fewest clients that only fill up
    return jnp.minimum(jnp.arange(-(-total // size) * size), total - 1).reshape(-1, size)


def scored_at_once(total: int, chunk: int, devices: int = 1) -> int:
    """Clients whose models each device computes side by side when ``total`` of them are scored."""
    return min(chunk, max(1, GROUP // devices)) if total > GROUP else divisor(-(-total // devices), chunk)


def is_mapped(config: Config, problem: Problem) -> bool:
    """Are clients drawn in a plane, by the subspaces of their low-rank updates?"""
    return client_map.is_drawn(sum(config.scored)) and bool(lora.low_rank_leaves(problem.adapters))


def nothing(base: Params, model: Adapter) -> tuple[()]:
    """Nothing is read of a model."""
    return ()


def accuracy_on_sides(correct_fn: Callable, test: tuple[Array, Array], known: int, base: Params, model: Adapter):
    """``[2]`` accuracy of a model on all test images of classes below ``known``, and on all of the others."""
    correct, novel = correct_fn(base, model, test), test[1] >= known
    return jnp.stack([jnp.mean(correct, where=side) for side in (~novel, novel)])


def subspaces(base: Params, model: Adapter) -> list[Array]:
    """Orthonormal bases ``[..., r, out]`` of what the rows of ``b`` span in one model, for each adapted kernel."""
    return [clustering.bases(x.b) for x in lora.low_rank_leaves(model)]
