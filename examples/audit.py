"""What clients give away, on the built-in digits: who trained on what, and what a signature says of its client.

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
from fedlora_jax import audit, training
from fedlora_jax.methods.fedit import fedit

KINDS = ("full", "label_free", "noisy", "shuffled", "constant")


def members(clients: int = 16, pool: int = 200, steps: tuple[int, ...] = (5, 50), batch: int = 16) -> list[str]:
    """A line for each number of local steps: areas under the curve, and true positives at 1 % false ones."""
    p = problem.build(Config(clients=2, holdout_clients=0, partition="iid", seeds=(0,)))
    rng = np.random.default_rng(0)
    images = tuple(a[rng.permutation(len(p.train[1]))[:pool]] for a in p.train)
    held = np.stack([rng.permutation(pool) < pool // 2 for _ in range(clients)])
    adapter = jax.tree.map(lambda x: x[0], p.adapters)
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


if __name__ == "__main__":
    for name in sys.argv[1:] or ("members", "signatures"):
        print("\n".join({"members": members, "signatures": signatures}[name]()))
