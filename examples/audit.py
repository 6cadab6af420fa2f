"""What clients give away, on the built-in digits: a claim of epsilon held against a canary, one example read off a
step, who trained on what, and what a signature says of its client.

``python examples/audit.py canaries`` has a client (of ten) or an example always push in one direction, or not at all,
and says which epsilon tells both apart (a lower bound at 95 %) beside what is claimed of all rounds together: it lies
below, and with a quarter of the noise under the same claim above. ``python examples/audit.py example`` reads the label
and the features of an image off one local step of the head, plain and with ``dp_sgd``.

``python examples/audit.py images`` looks for the image itself, by everything that one step on it changes, low-rank
factors included (``audit.inverted``; the label is given), and says how near what is found is to the true one; the guess
is the mean of the other images of its class.

``python examples/audit.py members`` has 16 clients train on a random half each of 200 images and says how well these
are told from the others by what each client sends: by a threshold on the loss, by how much the loss has fallen, and by
likelihood ratios with the other clients for shadow models (``fedlora_jax.audit``). 0.5 is a guess.

``python examples/audit.py signatures`` has 120 clients tell a signature of each kind (``--signature``), and a linear
probe on four fifths of them say of the others from which domain most of their images are, and which classes they hold.
Beside it is the share that is right who always says what most clients are.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments.config import Config
from experiments.setup import problem
from experiments.setup.backbone import frozen_features
from fedlora_jax import accountant, audit, training
from fedlora_jax.clients import Sampling
from fedlora_jax.method import Cohort
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.wrappers import dp_sgd, innermost
from fedlora_jax.wrappers.privacy import dp

KINDS = ("full", "label_free", "noisy", "shuffled", "constant")


WIDTH, BOUND, DELTA, TEN = 20, 0.5, 1e-5, Sampling(10, 10)
ALONG = {"w": jnp.full(WIDTH, 3 * BOUND / WIDTH**0.5)}  # three times as long as it may be


def canaries(trials: int = 4000) -> list[str]:
    """A line for each account: claimed, measured, and measured with a quarter of the noise that the claim is of."""
    title = "| who pushes, or not | claimed | measured | with a quarter of the noise |"
    rows = [
        (what, claimed, *(told_apart(one, own, trials) for own in (z, z / 4))) for what, z, claimed, one in claims()
    ]
    return [title, "|---|---|---|---|", *("| {} | {:.2f} | {:.2f} | {:.2f} |".format(*row) for row in rows)]


def claims() -> list[tuple]:
    """Who, the noise multiplier, the epsilon that is claimed, and ``(z, there, key) -> []`` how far a run went."""
    of_rounds = lambda z, rounds: (z, accountant.epsilons(z, TEN, rounds, DELTA)[-1], client(rounds))
    twice = dp_sgd.uses(1, 4, 2)  # in both of two batches
    return [
        ("a client, in a round", *of_rounds(1.0, 1)),
        ("a client, in four rounds together", *of_rounds(2.0, 4)),
        ("an example, twice in each of two batches", 3.0, dp_sgd.spent(3.0, twice, DELTA), in_batches),
    ]


def told_apart(one, z: float, trials: int) -> float:
    """At least this epsilon: of runs with the canary and without."""
    keys = jax.random.split(jax.random.key(0), (2, trials))
    scores = (jax.jit(jax.vmap(lambda key, there=there: one(z, there, key)))(keys[there]) for there in (1, 0))
    return audit.epsilon_at_least(*map(np.asarray, scores), DELTA)


def client(rounds: int):
    """How far so many rounds of ``dp`` went along what the first of ten clients sends."""

    def one(z: float, there: int, key: jax.Array) -> jax.Array:
        method = dp(fedit(), TEN, rounds, BOUND, z)
        start, ten = jax.tree.map(jnp.zeros_like, ALONG), jnp.arange(10)
        state, none = method.init(key, start), jnp.zeros(10)
        cohort = Cohort(ten, none + 0.1, none, (), (), ())
        for _ in range(rounds):
            sent = method.dispatch({}, state, cohort)
            received = jax.tree.map(lambda x, d: x.at[0].add(there * d), sent.adapter, ALONG)
            state = method.aggregate({}, state, cohort, sent, received)
        return innermost(state).adapter["w"].sum()

    return one


def in_batches(z: float, there: int, key: jax.Array) -> jax.Array:
    """How far two local steps of ``dp_sgd`` went along the gradient of a client's one example, which counts or not."""
    method = dp_sgd.dp_sgd(fedit(), 1, 1, BOUND, z)
    local = training.make_local(method, lambda base, w, x, key: -(x @ w["w"]).mean(), optax.sgd(1.0))
    start = jax.tree.map(jnp.zeros_like, ALONG)
    examples = jnp.broadcast_to(there * ALONG["w"], (2, 2, WIDTH))
    return local({}, start, jax.tree.map(jnp.ones_like, start), start, examples, key)[0]["w"].sum()


def example(count: int = 40) -> list[str]:
    """A line for each way of training on a single image: labels that are right, cosine of features with the true ones;
    the guess that costs nothing is the mean of all others' features, and the most common label."""
    p, adapter = plain_problem()
    mask, (x, y) = jax.tree.map(jnp.ones_like, adapter), (a[:count] for a in p.train)
    truth, keys = frozen_features(p.backbone, np.asarray(x)), jax.random.split(jax.random.key(0), count)
    guess = [np.bincount(y).max() / count, cosine(truth.sum(0) - truth, truth)]
    found = {"a guess": guess}
    for name, method in {"plain": fedit(), "dp_sgd, noise 1": dp_sgd.dp_sgd(fedit(), 1, 1, noise=1.0)}.items():
        local = training.make_local(method, p.loss_fn, optax.sgd(0.1))
        one = lambda x, y, key, local=local: local(p.base, adapter, mask, adapter, (x[None, None], y[None, None]), key)
        new = jax.jit(lambda *row, one=one: jax.lax.map(lambda xyk: one(*xyk)[0]["head"], row))(x, y, keys)
        kernel, bias = (np.asarray(new[name] - adapter["head"][name]) for name in ("kernel", "bias"))
        labels, features = zip(*map(audit.of_one_example, kernel, bias), strict=True)
        found[name] = [np.mean(np.array(labels) == np.asarray(y)), cosine(np.array(features), truth)]
    lines = [f"| {name} | {100 * right:.0f} | {near:.3f} |" for name, (right, near) in found.items()]
    return ["| training | labels right, % | cosine of features |", "|---|---|---|", *lines]


def images(count: int = 8, steps: int = 300) -> list[str]:
    """A line for each way of training on a single image, whose factors ``b`` have left zero before."""
    p, adapter = plain_problem()
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    adapter = tree.unflatten([x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])
    mask, (every, labels) = jax.tree.map(jnp.ones_like, adapter), (np.asarray(a) for a in p.train)
    every, keys = every.astype(np.float32) / 255, jax.random.split(jax.random.key(0), count)

    def sent(method, x, y, key):
        local = training.make_local(method, p.loss_fn, optax.sgd(0.1))
        new, _ = local(p.base, adapter, mask, adapter, (255 * x[None, None], y[None, None]), key)
        return jax.tree.map(jnp.subtract, new, adapter)

    def search_one(y, key, seen):
        loss = lambda adapter, x: p.loss_fn(p.base, adapter, (255 * x[None], y[None]), key)
        downhill = lambda x: jax.tree.map(jnp.negative, jax.grad(loss)(adapter, x))  # where one step goes
        return audit.inverted(downhill, seen, jnp.full(every.shape[1:], 0.5), steps)

    search = jax.jit(lambda *row: jax.lax.map(lambda one: search_one(*one), row))
    same = [(labels == y) & (np.arange(len(labels)) != i) for i, y in enumerate(labels[:count])]
    found = {"a guess": np.stack([every[rows].mean(0) for rows in same])}
    for name, method in {"plain": fedit(), "dp_sgd, noise 1": dp_sgd.dp_sgd(fedit(), 1, 1, noise=1.0)}.items():
        seen = jax.jit(jax.vmap(lambda *row, method=method: sent(method, *row)))(every[:count], labels[:count], keys)
        found[name] = np.asarray(search(labels[:count], keys, seen))
    truth = every[:count]
    like = lambda a: np.mean([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, truth, strict=True)])
    lines = [f"| {name} | {like(a):.2f} | {np.mean((a - truth) ** 2):.3f} |" for name, a in found.items()]
    return ["| training | correlation of pixels | mean square error |", "|---|---|---|", *lines]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over rows."""
    return float(np.mean(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


def plain_problem():
    """The digits and one adapter, as it is sent in the first round."""
    p = problem.build(Config(clients=2, holdout_clients=0, partition="iid", seeds=(0,)))
    return p, jax.tree.map(lambda x: x[0], p.adapters)


def members(clients: int = 16, pool: int = 200, steps: tuple[int, ...] = (5, 50), batch: int = 16) -> list[str]:
    """A line for each number of local steps: areas under the curve, and true positives at 1 % false ones."""
    p, adapter = plain_problem()
    rng = np.random.default_rng(0)
    images = tuple(a[rng.permutation(len(p.train[1]))[:pool]] for a in p.train)
    held = np.stack([rng.permutation(pool) < pool // 2 for _ in range(clients)])
    local = training.make_local(fedit(), p.loss_fn, optax.sgd(0.1))
    mask = jax.tree.map(jnp.ones_like, adapter)
    one = lambda adapter, x, y: p.loss_fn(p.base, adapter, (x[None], y[None]), jax.random.key(0))
    losses_of = jax.jit(lambda adapter: jax.lax.map(lambda xy: one(adapter, *xy), images, batch_size=50))
    start, lines = np.asarray(losses_of(adapter)), []

    @jax.jit
    def sent(rows):
        batches = tuple(a[rows] for a in images)
        return local(p.base, adapter, mask, adapter, batches, jax.random.key(1))[0]

    for count in steps:
        own = [_epochs(rng, np.flatnonzero(row), count, batch) for row in held]
        losses = np.stack([losses_of(sent(rows)) for rows in own])
        before = np.broadcast_to(start, losses.shape)
        found = [-before, -losses, before - losses, audit.likelihood_ratios(losses, held)]
        areas = [f"{audit.area(scores[held], scores[~held]):.3f}" for scores in found]
        caught = np.mean(found[-1][held] > np.quantile(found[-1][~held], 0.99))
        lines.append(f"| {count} | {' | '.join(areas)} | {100 * caught:.1f} % |")
    titles = "local steps", "as sent", "loss", "fall of loss", "likelihood ratio", "caught at 1 %"
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *lines]


def _epochs(rng: np.random.Generator, own: np.ndarray, steps: int, batch: int) -> np.ndarray:
    """``[steps, batch]`` of a client's rows, epoch by epoch."""
    drawn = np.concatenate([rng.permutation(own) for _ in range(-(-steps * batch // len(own)))])
    return drawn[: steps * batch].reshape(steps, batch)


def signatures(clients: int = 120) -> list[str]:
    """A line for each kind of signature."""
    lines = []
    for kind in KINDS:
        how = {"partition": "domain_dirichlet:0.5", "minimum": 5, "signature": kind}
        p = problem.build(Config(clients=clients, holdout_clients=0, seeds=(0,), **how))
        people, train = p.clients.population, ~p.images.test
        domain, label = p.images.domain[train], np.asarray(p.train[1])
        own = [np.asarray(rows)[:size] for rows, size in zip(people.rows[0], people.sizes[0], strict=True)]
        told = np.concatenate([np.asarray(x[0, :, 0]) for x in people.signatures], -1)
        home = np.array([np.bincount(domain[rows]).argmax() for rows in own])
        holds = np.array([np.bincount(label[rows], minlength=len(p.images.classes)) > 0 for rows in own])
        common = [c for c in range(holds.shape[1]) if 0.1 < holds[:, c].mean() < 0.9]
        right = [probed(told, home), np.mean([probed(told, holds[:, c]) for c in common], 0)]
        lines.append(f"| {kind} | " + " | ".join(f"{100 * a:.0f} ({100 * b:.0f})" for a, b in right) + " |")
    return ["| signature | domain | holds a class |", "|---|---|---|", *lines]


def probed(told: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """The share that a linear probe gets right of clients that it has not seen, and that of the most common answer."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    said = cross_val_predict(probe, told, truth, cv=5)
    return float(np.mean(said == truth)), float(np.bincount(truth.astype(int)).max() / len(truth))


TABLES = {"canaries": canaries, "example": example, "images": images, "members": members, "signatures": signatures}

if __name__ == "__main__":
    for name in sys.argv[1:] or TABLES:
        print("\n".join(TABLES[name]()))
