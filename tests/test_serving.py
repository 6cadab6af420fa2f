"""Every command serves clients in one way: the scores of compare, budget and sweep are the same, newcomers' too."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from input_helpers import PLAIN, change

from experiments.cli import parse
from experiments.commands import budget, sweep
from experiments.engine import evaluation, facts, methods, trial
from experiments.results import client_map, metrics
from experiments.setup import memory, problem
from experiments.setup.local_training import make_optimizer
from fedlora_jax import rounds

OPTIONS = (
    "--partition iid --clients 4 --holdout-clients 2 --minimum 4 --rounds 3 --eval-every 3 --local-steps 2 --batch 4 "
    "--seeds 1 --lr 0.3"
)
PHASES = "fedrep"
METHODS = ("hilora:root=0.4:cluster=0.6", PHASES)  # a trial of newcomers; phases


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "data.npz"
    change(domain=np.arange(96) // 3 % 3 // 2)(path)  # of the test images a quarter are of the second
    return [*OPTIONS.split(), *PLAIN, "--data", str(path)]


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_a_comparison_a_budget_and_a_sweep_give_every_client_the_same_accuracy(name, options, monkeypatch):
    """Sweeps score by the very function that comparisons score by: of them one method is looked at."""
    monkeypatch.setattr(budget, "TAUS", (0, 2))
    config = parse(["run", "--method", name, *options])[1]
    p = problem.build(config, partial(facts.acceptable, config))
    own = trial.Trial(config, p, name)
    run = own.programs.start(p.adapters, p.keys)
    run, _ = own.programs.train(p.base, p.train, p.clients, run, p.keys)
    scores = own.programs.evaluate(p.base, p.train, p.test, p.clients, run, p.keys, np.bool_(True))
    found = budget.program(config, p, own.method, 1, budget.TAUS)((config.lr,))
    clients = np.asarray(found.clients)[0, 0]  # [taus, N + K]
    np.testing.assert_array_equal(clients[budget.TAUS.index(0)], scores.personal[0])
    np.testing.assert_array_equal(clients[budget.TAUS.index(2)], scores.tuned[0])
    whole = metrics.mean_over(np.asarray(p.test[2]), np.asarray(scores.correct[0]))
    np.testing.assert_allclose(found.overall[0, 0, -1], whole, rtol=1e-5)
    np.testing.assert_allclose(found.personal[0, 0, -1], np.nanmean(scores.personal[0, :4]), rtol=1e-6)
    if name != PHASES:
        return
    lowered, arguments = sweep.Plan(dataclasses.replace(config, lrs=(config.lr,))).lowered[name]
    (_, swept), _ = lowered.compile()(*arguments)  # [points, seeds, blocks, ...]
    for part in ("correct", "personal", "tuned"):
        np.testing.assert_array_equal(getattr(swept, part)[0, 0, -1], getattr(scores, part)[0], err_msg=part)


@pytest.mark.long
def test_clients_served_in_groups_have_the_accuracies_of_all_at_once(options, monkeypatch):
    """Six clients in groups of four: the last group is filled up, and no group sees another's clients.

    What an unseen client's trial finds, it keeps: of HiLoRA the cluster in which it is served.
    """
    name = METHODS[0]
    config = parse(["run", "--method", name, *options])[1]
    p = problem.build(config, partial(facts.acceptable, config))
    method = methods.build(name, **facts.facts_of(config, p.signature, p.smallest))
    seed = jax.tree.map(lambda x: x[0], p.everyone())
    run = rounds.start(method, seed.key, seed.adapter, config.clients)
    moved = jax.tree.map(lambda x: x + 0.3 * np.ones(x.shape, x.dtype), seed.adapter)
    run = run._replace(state=run.state._replace(root=moved, stage=np.int32(1)))
    found = []
    for most in (256, 4):
        monkeypatch.setattr(evaluation, "GROUP", most)
        serving = evaluation.make_serving(config, p, method, make_optimizer(config), 2)

        def served(arrays, seed, run, serving=serving):
            own = serving.onboard(arrays, seed, run)
            return serving.score(arrays, seed, run, own, 2, evaluation.subspaces), own

        found.append(jax.jit(served)(p.arrays(), seed, run))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), *found)
    own = found[0][1].cluster
    assert (own[: config.clients] == -1).all()
    assert (own[config.clients :] >= 0).all()


@pytest.mark.long
def test_scoring_holds_no_images_of_more_than_one_group(options, monkeypatch):
    """No array of the program is as large as the test images, or the images of local steps, of all clients."""
    monkeypatch.setattr(evaluation, "GROUP", 2)
    config = parse(["run", "--method", "fedit", *options, "--batch", "24", "--local-steps", "8"])[1]
    p = problem.build(config)
    method = methods.build("fedit", **facts.facts_of(config, p.signature, p.smallest))
    seed = jax.tree.map(lambda x: x[0], p.everyone())
    run = rounds.start(method, seed.key, seed.adapter, config.clients)
    serving = evaluation.make_serving(config, p, method, make_optimizer(config), 1)
    arrays = p.arrays()
    own = arrays.train[0].shape[1:]
    for steps, images in ((0, p.clients.test_rows.shape[-1]), (8, 8 * 24)):
        program = jax.make_jaxpr(lambda *row, steps=steps: serving.score(*row, (), steps))(arrays, seed, run)
        made = [x for x in memory.made(program.jaxpr) if x.shape[-len(own) :] == own]
        assert 0 < max(x.size for x in made) <= 2 * images * np.prod(own)


def test_of_many_clients_no_distances_are_computed(options, monkeypatch):
    config = parse(["run", "--method", "fedit", *options])[1]
    p = problem.build(config)
    seed = jax.tree.map(lambda x: x[0], p.everyone())
    method = methods.build("fedit", **facts.facts_of(config, p.signature, p.smallest))
    run = rounds.start(method, seed.key, seed.adapter, config.clients)
    arrays = p.arrays()
    for most, shape in ((6, (6, 6)), (5, None)):
        monkeypatch.setattr(client_map, "CLIENTS", most)
        scores = evaluation.make_scores(config, p, method, make_optimizer(config), 1)
        apart = jax.eval_shape(scores, arrays, seed, run, np.bool_(True)).distances
        assert (None if apart is None else apart.shape) == shape
