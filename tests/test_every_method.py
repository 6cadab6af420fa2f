"""What every method must satisfy. A new method enters the table in ``helpers.py`` and passes this file as it is."""

import functools
import pkgutil
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    BATCH,
    CLIENTS,
    EVERY,
    EXACT,
    KEY,
    METHODS,
    OPTIMIZER,
    PLATFORMS,
    RANK,
    SHOWN,
    STACKS,
    STEPS,
    WRAPPED,
    aggregation,
    assert_near,
    average,
    begin,
    built,
    cohort,
    compiled,
    copies,
    dispatched,
    effective,
    examples,
    host,
    is_float,
    jit,
    loss_fn,
    mean_weights,
    members,
    models_of,
    normalised,
    nudged,
    population,
    remembered,
    replaced,
    take,
    train,
    uploads,
    weights_of,
)

import fedlora_jax.methods
from experiments.commands import export
from experiments.results.checkpoints import Checkpoints
from fedlora_jax import attacks, lora, rounds
from fedlora_jax.clients import sample_held_out
from fedlora_jax.method import About, each_alone, models
from fedlora_jax.task import of_batch
from models import peft, peft_in
from models.backbone import Layout, Linear

# Where a test does not apply, and why. Everything else must hold for every method and every stack of wrappers.
_SERVER = "the server takes steps of its own, which a round of identical clients does not stop"
EXCEPTIONS = {
    "order": {"centralized": "one machine reads batches one after the other, and its order is that of the clients"},
    "weight": {"centralized": "pooled examples count alike, whoever brought them"},
    "whole state": dict.fromkeys(("hyperlora", "hyperlora_exact"), "the server keeps uploads beside their weights"),
    "fixed point": {
        "local_only": "the server has no model",
        "frozen": "the server has no other model than the one it came with",
        "pfedhn": "the server learns a network from what clients changed and averages nothing",
        "dp": "the mean is of clipped updates, whatever clients weigh",
        "private": "the mean is of products, in factors of its own",
        "clip": "the clients' update is cut before it is averaged",
        "feddyn": "w_g = mean of w_i - h / al goes beyond the mean",
        "dynamic": "has FedDyn in it",
        "fedglomo": "the server's step remembers the last one",
        "fedalt": "half of a client's model is of the others, by its inputs",
        "gossip": "there is no server",
        "fedproto": "the server has no model",
        "adf_lora": "there is no server",
        "spectral": "what does not stand out is dropped",
        "florist": "what is beyond a share of the energy is dropped",
        "weighed": "has clipping in it",
        "defended": "has clipping in it",
        "personal": "has clipping in it",
    }
    | dict.fromkeys(("server", "fedadam", "corrected", "outliers"), _SERVER),
    "one client": dict.fromkeys(("krum", "outliers"), "Krum needs a cohort in which an update can have neighbours"),
    "all of b": {
        "pfedme": "theta is computed, not trained",
        "ifca": "of the models, only the one that a client chose is kept as trained",
        "rolora": "the second round trains a",
        "adf_lora": "the second round trains a",
        "fed_sb": "clients train a core between a and b",
        "fedra": "a shallow client trains b of some blocks",
        "fed_hello": "a client on a budget trains b of some layers",
        "ravan": "clients train cores between a and b",
        "lora_a2": "clients train the ranks that they choose",
    },
    "first columns": {
        "fslora": "a client of rank 1 holds any one column",
        "fed_sb": "rows and columns of the core are cut",
        "sdflora": "the local part has one rank for all",
        "pf2lora": "the local part has one rank for all",
        "ravan": "heads are cut",
        "lora_a2": "a client of rank 1 holds all columns and moves some",
    },
}
EXCEPTIONS["one client"] |= EXCEPTIONS["fixed point"]
# What of all that a client carries the server averages.
SENT = {name: lambda carried: carried["shared"] for name in ("finetune", "ditto", "pfedme", "personal")}
SENT |= dict.fromkeys(("feddpa", "fdlora"), SENT["ditto"])
SENT |= {name: lambda carried: carried.shared for name in ("sdflora", "pf2lora")}
SENT["fedimpro"] = lambda carried: carried.own
SENT["fedglomo"] = lambda carried: carried["now"]


# Every method runs a round in the suite that is run at every change, and what can be seen in that program is looked at.
# Tests that compile more run with the long ones, but for a few methods:
FEW = {
    "fedit",  # plain factors
    "flexlora",  # a decomposition
    "ditto",  # two models for each client, and memory
}


def every(names, test: str | None = None, always: set[str] | None = None):
    """``names``, without the exceptions of a test; all but ``always`` (where given) run with the long tests."""
    held = [name for name in names if name not in EXCEPTIONS.get(test or "", {})]
    long = lambda name: always is not None and name not in always
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.long) if long(name) else name for name in held]
    )


# Wrappers are looked at in stacks, which together hold every one of them and cost no more than one; alone only where a
# stack has another in it to which the test does not apply.
WHOLE = METHODS | STACKS
every_method = every(WHOLE)
# Loops over seeds, rounds and chunks are the same code for all and see a method through its hooks alone. That these
# keep the state's structure, are traced once and depend on nothing else is looked at for every method; the loops for
# one of each kind of what they carry:
LOOPED = (
    "pfedme",  # examples kept apart, an objective with a loop of its own
    "dynamic",  # signatures, memory at clients and at the server, a penalty
)
# Derivatives go through local steps in one way, whoever's they are; looked at are those that minimise
STEPPED = (
    "fedit",  # the task's loss alone
    "ditto",  # two losses
    "pfedme",  # a loss in whose gradient a loop runs
    "per_fedavg",  # a loss after a step
    "dynamic",  # penalties of wrappers, weights in the loss, clients' memory
)
# And through servers by what they do; of decompositions there is one, which finite differences are held to
# (``test_product_algebra``), and of HyperLoRA's the whole (``test_meta``).
# A method whose server does anything else joins.
DERIVED = (
    "flexlora",  # decomposes
    "fedex_lora",  # leaves something in the base
    "lora_fair",  # corrects in a loop
    "lora_fair_ridge",  # solves equations
    "fedhl",  # weighs
    "spectral",  # drops what does not stand out
    "fedra",  # leaves blocks out
    "ifca",  # has several models
    "fedglomo",  # remembers
    "fedalt",  # mixes by input
    "outliers",  # chooses
)
# Malicious clients send what their method lets them: of each way that clients are put together, and of what travels.
ATTACKED = (
    *sorted(FEW),
    "centralized",  # pooled
    "fedrep",  # trained in two phases
    "local_only",  # nothing
    "fedsa_lora",  # a part
    "ifca",  # one of several
)


def test_exceptions_are_of_methods_that_exist():
    known = {name for names in EXCEPTIONS.values() for name in names} | FEW | {*LOOPED, *STEPPED, *DERIVED, *ATTACKED}
    assert not known - EVERY.keys()


def test_stacks_hold_every_wrapper():
    stack = lambda names: {wrapper for name in names for wrapper in built(EVERY[name]).stack}
    assert stack(WRAPPED) == stack(STACKS) | {"server"}  # as FedAdam is, with another transformation


def averaged(name, method, sent, received):
    """The adapters ``[C, ...]`` that should become the server's model."""
    if name in SENT:
        return SENT[name](received)
    return models_of(method, sent._replace(adapter=received))


def test_every_module_of_methods_is_in_the_table():
    for module in pkgutil.iter_modules(fedlora_jax.methods.__path__):
        assert module.name in METHODS, f"add {module.name} to METHODS in tests/helpers.py"
        about = getattr(pkgutil.resolve_name(f"fedlora_jax.methods.{module.name}"), "ABOUT")  # noqa: B009
        assert isinstance(about, About)


@every_method
def test_a_round_keeps_the_structure_shapes_and_dtypes_of_the_state(name):
    m = compiled(name)
    signature = lambda x: (jax.tree.structure(x), [(y.shape, y.dtype) for y in jax.tree.leaves(x)])
    assert signature(m.state) == signature(m.start)
    assert all_finite(m.state)


def all_finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(host(tree)) if is_float(x))


@every_method
def test_it_is_traced_once(name):
    m = compiled(name)
    state, before = m.state, len(m.traces)
    m.fast(BASE, state, m.cohort(5), jax.random.key(9))
    assert len(m.traces) == before


def lowered(f, *arguments):
    """The function's text for every platform at once; refused where one of them cannot do what it does, or where it
    asks the host."""
    return f.trace(*arguments).lower(lowering_platforms=PLATFORMS).as_text()


@every_method
def test_a_round_is_one_program_on_cpu_cuda_and_tpu(name):
    m = compiled(name)
    state, before = m.state, len(m.traces)
    text = lowered(m.fast, BASE, state, m.cohort(), KEY)
    assert "platform_index" in text
    assert len(m.traces) == before
    # Two batches of LAPACK at once hang for ever on a CPU of two cores (jaxlib 0.10.2): it is given single matrices.
    assert not re.findall(r'@lapack_\w+.*num_batch_dims = "[^0]"', text)


def test_what_a_platform_cannot_do_and_what_asks_the_host_is_refused():
    for f in jax.lax.linalg.schur, lambda x: jax.pure_callback(np.sin, x, x):
        with pytest.raises(NotImplementedError, match=r"tpu|callback"):
            lowered(jax.jit(f), jnp.eye(3))


@every_method
def test_dispatch_gives_every_client_a_row_and_leaves_the_rest_of_the_base_alone(name):
    m = compiled(name)
    sent = dispatched(m.method, m.state, m.cohort())
    carried = models_of(m.method, sent)
    for tree in (sent.adapter, sent.context, carried):
        assert all(x.shape[0] == CLIENTS for x in jax.tree.leaves(tree))
    jax.tree.map(lambda x, m: jnp.broadcast_shapes(x.shape, m.shape), sent.adapter, sent.mask)
    weights = weights_of(sent.base, take(carried, 0))
    assert {k: x.shape for k, x in weights.items()} == {k: x.shape for k, x in lora.flatten(BASE).items()}
    traced = lambda base, *rest: m.method.dispatch(base, *rest).base["blocks"]["bias"] is base["blocks"]["bias"]
    assert untraced(traced, BASE, m.state, m.cohort())


def untraced(f, *arguments):
    """What the function returns, its arrays known by their shapes alone: nothing is computed."""
    said = []
    jax.eval_shape(lambda *args: said.append(f(*args)), *arguments)
    return said[0]


@pytest.mark.long
@pytest.mark.parametrize("name", LOOPED)
def test_a_whole_run_is_a_loop_over_single_rounds(name):
    """Seeds side by side, rounds scanned, clients in chunks, state donated: against one round after the other on
    cohorts made by hand."""
    m, data, clients = compiled(name), examples(), population((5, 9, 3, 7))
    chunked = rounds.make_round(m.method, SHOWN, OPTIMIZER, chunk=2)
    query = m.method.query
    step = rounds.make_step(chunked, participants=CLIENTS, steps=STEPS, batch=BATCH, smallest=3, query=query)
    seeds = jax.random.split(KEY, 2)
    runs = jit(jax.vmap(lambda key: rounds.start(m.method, key, ADAPTER, CLIENTS)))(seeds)
    program = jit(jax.vmap(rounds.scan_rounds(step, 2), (None, None, None, 0, 0)), donate_argnums=3)
    runs, info = host(program(BASE, data, clients, runs, seeds))

    ids, draw = np.arange(CLIENTS, dtype=np.int32), jit(sample_held_out, static_argnums=(4, 5, 6, 7))
    for i, seed in enumerate(seeds):
        state, losses, memory = begin(m.method.init, seed), [], m.cohort().memory
        for t in range(2):
            _, drawn, key = jax.random.split(jax.random.fold_in(seed, t), 3)
            batches, queries = draw(drawn, data, clients, ids, STEPS, BATCH, 3, query)
            c = clients.cohort(ids, host(memory), batches, queries or m.cohort().queries)
            state, memory, one = m.fast(BASE, state, c, key)
            losses.append(one.loss)
        assert runs.round[i] == 2
        assert_near(info.loss[i], np.stack(losses))
        c = c._replace(memory=memory)
        assert_near(effective(m.method, BASE, take(runs.state, i), c), effective(m.method, BASE, state, c))


@every(WHOLE, "order")
def test_the_order_of_clients_does_not_matter(name):
    m = compiled(name)
    c = m.cohort(1)
    order = np.asarray([2, 0, 3, 1])
    state, _, info = m.fast(BASE, m.state, c, KEY)
    turned, _, turned_info = m.fast(BASE, m.state, take(c, order), KEY)
    assert_near(effective(m.method, BASE, turned, c), effective(m.method, BASE, state, c))
    assert_near(turned_info.loss, take(info.loss, order))
    assert_near(turned_info.aggregation, info.aggregation, 1e-3, floor=1e-3)


@every(WHOLE, "weight")
def test_a_client_of_weight_zero_changes_nothing(name):
    m = compiled(name)
    c, other = m.cohort(1, weights=[1, 2, 3, 0]), m.cohort(2)
    of = lambda c: (c.ids, c.signatures, c.batches, c.queries)
    ids, told, batches, queries = replaced(of(c), 3, of(other._replace(ids=other.ids + 50)))
    changed = c._replace(ids=ids, signatures=told, batches=batches, queries=queries)
    state, _, info = m.fast(BASE, m.state, c, KEY)
    again, _, again_info = m.fast(BASE, m.state, changed, KEY)
    if name not in EXCEPTIONS["whole state"]:
        assert_near(again, state, 1e-6)
    assert_near(effective(m.method, BASE, again, c), effective(m.method, BASE, state, c), 1e-6)
    assert_near(again_info.aggregation, info.aggregation, 1e-3, floor=1e-3)
    assert take(again_info.loss, 3) != take(info.loss, 3)


@every(WHOLE, "weight")
@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_a_round_with_a_client_that_fails_is_the_round_without_it(name, bad):
    """Its data are no numbers, or so large that its loss or its update are; it never answers."""
    m = compiled(name)
    c = m.cohort(1)
    broken = jax.tree.map(lambda x: replaced(x, 3, bad) if is_float(x) else x, (c.batches, c.queries))
    state, memory, info = m.fast(BASE, m.state, c._replace(batches=broken[0], queries=broken[1]), KEY)
    silent = c._replace(weights=replaced(c.weights, 3, 0.0))
    without, kept, told = m.fast(BASE, m.state, silent, KEY)
    assert all_finite(state)
    # Adam of HyperLoRA's parts enlarges what rounding leaves of the smallest gradients (in float64: 2e-14).
    assert_near((state, memory), (without, kept), 5e-4 if name.startswith("hyperlora") else 1e-5, floor=0.1)
    assert_near(take(memory, 3), take(c.memory, 3), 0)
    assert_near(info.aggregation, told.aggregation, 2e-3, floor=1e-3)
    assert info.dropped == told.dropped == 1


@every(ATTACKED, always=FEW)
def test_a_client_that_attacks_sends_what_the_server_can_take(name):
    """To the bit what all have trained where nobody is malicious, and for everybody else; never what is no number."""
    method, state, new_state = aggregation(name)
    c = normalised(members(method))
    sent = dispatched(method, state, c)
    received, _ = train(method, sent, c, KEY)
    attacked = lambda bad: host(arrive(method, c._replace(malicious=np.float32(bad)), sent, received))
    assert_near(attacked([0] * CLIENTS), received, 0)
    arrived = attacked([0, 0, 1, 1])
    assert_near(take(arrived, [0, 1]), take(received, [0, 1]), 0)
    untouched = all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (arrived, received)), strict=True))
    silent = not any(x.any() for x in jax.tree.leaves(host(method.upload_mask(sent.mask))))
    assert untouched == (silent or method.pool is not each_alone)
    assert all_finite(new_state(BASE, state, c, sent, arrived))


@functools.partial(jit, static_argnums=0)
def arrive(method, c, sent, received):
    return attacks.sent_by(attacks.alie(), method, c, sent, received, (), KEY)[0]


@every(EVERY, "fixed point", always=FEW)
def test_identical_clients_are_a_fixed_point(name):
    """The server's weights become theirs (FLoRA restarts its factors, and keeps the weights)."""
    method, state, new_state = aggregation(name)
    c = normalised(take(members(method), np.zeros(CLIENTS, int)))
    sent = dispatched(method, state, c)
    received, _ = train(method, sent, c, KEY)
    new = new_state(BASE, state, c, sent, received)
    after = effective(method, BASE, new, remembered(method, c, sent, received))
    assert_near(after, weights_of(sent.base, take(averaged(name, method, sent, received), 0)))


@every(WHOLE, "one client", always=FEW)
def test_one_client_is_plain_fine_tuning(name):
    """What the one that counts has trained, against a loop written with optax alone, of what the method says is
    minimised."""
    method, state, new_state = aggregation(name)
    own, c = 1, normalised(members(method, weights=[0, 1, 0, 0]))
    sent = dispatched(method, state, c)
    received, losses = train(method, sent, c, KEY)
    adapter, mask, context = (take(x, own) for x in (sent.adapter, sent.mask, sent.context))
    moments, said = OPTIMIZER.init(adapter), (method.objective, method.model, method.penalty, method.mask_schedule)
    for t in range(STEPS):
        key, batch = jax.random.fold_in(jax.random.fold_in(KEY, c.ids[own]), t), take(c.batches, (own, t))
        adapter, moments, loss = one_step(said, sent.base, adapter, moments, mask, context, batch, key, t / STEPS)
        assert_near(losses[own, t], loss)
    new = new_state(BASE, state, c, sent, received)
    after = effective(method, BASE, new, remembered(method, c, sent, received))
    carried = replaced(received, own, copies(adapter, CLIENTS))
    assert_near(after, weights_of(sent.base, take(averaged(name, method, sent, carried), own)))


@functools.partial(jit, static_argnums=0)
def one_step(hooks, base, adapter, moments, mask, context, batch, key, progress):
    """One local step of what the method says is minimised; compiled once for all methods that train alike."""
    objective, model, penalty, moving = hooks
    task = of_batch(SHOWN, base, batch, key)

    def minimised(adapter):
        loss, reported = objective(task, adapter, context) if objective else 2 * (task(model(adapter, context)),)
        return loss + penalty(adapter, context), reported

    (_, loss), grads = jax.value_and_grad(minimised, has_aux=True)(adapter)
    moves = lambda tree: jax.tree.map(jnp.multiply, tree, moving(mask, progress))
    updates, moments = OPTIMIZER.update(moves(grads), moments, adapter)
    return optax.apply_updates(adapter, moves(updates)), moments, loss


@every(WHOLE, always=FEW)
def test_what_is_masked_never_moves_and_everything_else_does(name):
    """Under AdamW with weight decay, for clients of ranks 1 and 2, from a second round's state in which no entry is
    zero."""
    method, start, new_state = aggregation(name)
    first, c = (normalised(members(method, 1, ranks=ranks)) for ranks in ([2, 2, 2, 2], [1, 2, 2, 1]))
    sent = dispatched(method, start, first)
    state = new_state(BASE, start, first, sent, uploads(sent))
    sent = host(dispatched(method, nudged(state), c))
    received, _ = train(method, sent, c, KEY)
    for x, y, mask in zip(*map(jax.tree.leaves, (sent.adapter, received, sent.mask)), strict=True):
        mask = np.broadcast_to(mask, x.shape).astype(bool)
        np.testing.assert_array_equal(x[~mask], y[~mask])
        assert ((x != y) == mask).mean() > 0.95
    for x, rows in zip(*map(lora.low_rank_leaves, (received, sent.mask)), strict=True):
        columns = name in EXCEPTIONS["first columns"] or not x.a[..., 1][[0, 3]].any()
        assert columns, "a client of rank 1 has one column"
        trains = rows.b[1:3].all() or name in EXCEPTIONS["all of b"]
        assert trains, "a client of full rank trains all of b"


@every_method
def test_a_cohort_of_several_ranks_is_aggregated(name):
    """Clients of rank 1 are sent one column, and a server that heard of no other can still train all of its own."""
    m = compiled(name)
    for ranks in [1, 2, 2, 1], [1, 1, 1, 1]:
        c = m.cohort(1, ranks=ranks)
        state, memory, info = m.fast(BASE, m.state, c, KEY)
        assert all_finite((state, info))
    for x in lora.low_rank_leaves(host(dispatched(m.method, state, c._replace(memory=memory)).adapter)):
        assert name in EXCEPTIONS["first columns"] or not (x.a[..., 1].any() or x.b[..., 1, :].any())
    whole = host(dispatched(m.method, state, m.cohort(2)).adapter)
    for x in lora.low_rank_leaves(whole):
        assert (x.a.any(-2) | x.b.any(-1)).all(), "a column that is zero in both factors has no gradient ever again"


@every(STEPPED, always=FEW)
def test_a_round_has_finite_derivatives_at_the_start(name):
    """At b = 0, where every run begins: of a loss after one round, in every float of the state before it."""
    m = compiled(name)
    c = m.cohort(1)

    def after(start):
        state, memory, _ = m.round_fn(BASE, start, c, KEY)
        sent = m.method.dispatch(BASE, state, c._replace(memory=memory))
        one = lambda model, batch: loss_fn(sent.base, model, batch, KEY)
        return jax.vmap(one)(models(m.method, sent), jax.tree.map(lambda x: x[:, 0], c.batches)).sum()

    assert_finite_derivatives(after, m.start)


@every(DERIVED, always=FEW)
def test_a_server_has_finite_derivatives_at_the_start(name):
    """The same without local steps: of what is sent after one aggregation of whatever clients have sent."""
    method, start, _ = aggregation(name)
    c = normalised(members(method, 1))

    def after(start):
        sent = method.dispatch(BASE, start, c)
        way = nudged(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), sent.adapter))
        received = jax.tree.map(lambda x, m, d: x + m * d, sent.adapter, sent.mask, way)
        again = method.dispatch(BASE, method.aggregate(BASE, start, c, sent, received), c)
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves((again.base, models(method, again))))

    assert_finite_derivatives(after, start)


def assert_finite_derivatives(f, state):
    """Of a scalar in every float of the state; not all are zero."""
    leaves, treedef = jax.tree.flatten(state)

    def of_floats(floats):
        rest = iter(floats)
        return f(treedef.unflatten([next(rest) if is_float(x) else x for x in leaves]))

    grads = host(jit(jax.grad(of_floats))([x for x in leaves if is_float(x)]))
    assert all_finite(grads)
    assert any(np.abs(g).max() > 1e-3 for g in grads)


@every(WHOLE, always=FEW)
def test_the_reported_loss_leaves_the_penalty_out(name):
    method, state, _ = aggregation(name)
    c = members(method)
    sent = dispatched(method, state, c)
    _, losses = train(method, sent, c, KEY)
    _, same = train(method, sent, c, KEY, extra=1e3)
    assert_near(same, losses)


@pytest.mark.long
@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_hold_the_mean_of_the_clients_weights(name):
    method, _, new_state = aggregation(name)
    state = compiled(name).state
    for ranks in [2, 2, 2, 2], [1, 2, 2, 1], [1, 1, 1, 1]:
        c = normalised(cohort(1, ranks=ranks))
        sent = dispatched(method, state, c)
        received, _ = train(method, sent, c, KEY)
        new = new_state(BASE, state, c, sent, received)
        theirs = models_of(method, sent._replace(adapter=received))
        whole = c._replace(ranks=np.full(CLIENTS, RANK, np.int32))
        assert_near(effective(method, BASE, new, whole), mean_weights(sent.base, theirs, c.weights))


@every_method
def test_a_checkpoint_restores_every_bit(name, tmp_path):
    m = compiled(name)
    run = jax.tree.map(jnp.asarray, rounds.Run(m.state, m.cohort().memory, np.ones((), np.int32)))
    store = Checkpoints(tmp_path, {"method": name})
    store.save(1, run)
    assert store.whole() == ([1], [])
    again = store.restore(1, jax.tree.map(lambda x: x, run))
    assert jax.tree.structure(again) == jax.tree.structure(run)
    assert_near(again, run, 0)


# A problem's layers as PyTorch would name them.
LAYOUT = Layout(
    {"blocks.0": Linear(("blocks/kernel",), 0), "blocks.1": Linear(("blocks/kernel",), 1)}
    | {name: Linear((f"{name}/kernel",)) for name in ("mix", "head")},
    "",
)


def read_again(folder, files):
    """The weights that a folder of PEFT makes of the base."""
    for file, content in files.items():
        (folder / file).write_bytes(content)
    found, weights = peft_in.read(folder, {"": LAYOUT}, host(BASE)), host(lora.flatten(BASE))
    for kernel, rows in found.updates.items():
        weights[kernel] = weights[kernel].copy()
        for row, (a, b, scale) in rows.items():
            weights[kernel][... if row is None else row] += scale * a @ b
    return weights | found.full


def forward(w, x):
    for layer in range(2):
        h = np.tanh(x @ w["blocks/kernel"][layer] + w["blocks/bias"][layer])
        x = x + h @ w["mix/kernel"]
    return x @ w["head/kernel"] + w["head/bias"]


@every_method
def test_what_is_exported_computes_what_is_sent(name, tmp_path):
    """As an adapter that PEFT holds, of a higher rank where there is more than one, and that is read; or merged."""
    run, x = compiled(name), examples(count=8)["x"]
    method, c = run.method, run.cohort()._replace(batches=(), queries=())
    out = dispatched(method, run.state, run.cohort())
    whole, nobody = average((method.dispatch, method.model), BASE, run.state, c)
    if name == "fedalt":
        with pytest.raises(ValueError, match=r"weighs its updates by their input \(\w+/mixer\), which no weights say"):
            export.of_receivers(["global"], whole, nobody)
        return
    served = [export.of_receivers(["global"], whole, nobody)[0]]
    adapters = [take(nobody, 0), *(take(models_of(method, out), i) for i in range(CLIENTS))]
    receive = lambda: export.of_receivers(list("abcd"), out.base, models_of(method, out))
    if name == "fedra":
        with pytest.raises(ValueError, match=r"model of \w leaves blocks out \(blocks/gate\), which no weights say: "):
            receive()
    else:
        served += receive()
    for model, sent in zip(served, adapters, strict=False):
        expected = forward(weights_of(model.base, sent), x)
        adapter, beyond = export.as_adapter(BASE, model)
        merged = forward(host(lora.flatten(lora.merge(model.base, model.adapter))), x)
        np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)
        if not beyond:
            assert not peft.unheld(LAYOUT, BASE, adapter)
            again = forward(read_again(tmp_path, peft.files_of(LAYOUT, host(BASE), host(adapter), {})), x)
            np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-4)
