"""The table of metrics: a metric that is put in it is in rows, summary, tables, report and picture."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from test_report import Page, make, write

from experiments.commands import sweep
from experiments.config import Config
from experiments.engine.evaluation import Scores
from experiments.engine.rows import Rows
from experiments.results import figures, metrics, summary
from experiments.results.metrics import Evaluation, Metric
from experiments.results.style import styles_of
from fedlora_jax import attacks
from fedlora_jax.clients import Population
from fedlora_jax.methods.fedit import fedit

N, K = 23, 4
RNG = np.random.default_rng(0)
LABEL, DOMAIN = RNG.integers(0, 3, 60), RNG.integers(0, 2, 60)
CORRECT = (RNG.uniform(size=60) < 0.3 + 0.2 * LABEL).astype(np.float32)
OWN, TUNED = RNG.uniform(size=(2, N + K)).astype(np.float32)
OWN[[3, N]] = TUNED[[3, N]] = np.nan  # two without test images
TOY = Metric(
    "toy", lambda e: 0.125 + 0.25 * np.nanmax(e.training), "toy of all", "a toy", metrics.EVERYWHERE, ("bars",), "toy!"
)


def of_table(tuned=False):
    own = TUNED if tuned else OWN
    return metrics.of(Evaluation(CORRECT, LABEL, DOMAIN, own[:N], own[N:]), tuned)


def row_of(scores, final=True):
    """The row that a run writes, of made-up scores."""
    clients = SimpleNamespace(population=Population((), *np.full((2, 1, N + K), 2)))
    images = SimpleNamespace(domains=("ink", "chalk"), known=None)
    problem = SimpleNamespace(
        clients=clients, adapters={}, test=(None, LABEL, DOMAIN), images=images, attack=attacks.NOBODY
    )
    rows = Rows(Config(clients=N, holdout_clients=K, seeds=(0,)), problem, "fedit", fedit())
    return rows._accuracies(scores, final, 0)  # of the first seed


def test_every_number_is_what_its_name_says():
    found, known = of_table(), np.delete(OWN[:N], 3).astype(float)
    best, worst = np.sort(known)[-3:].mean(), np.sort(known)[:3].mean()  # of 22 clients, a tenth is three
    expected = {
        "global_accuracy": np.mean([CORRECT[d == DOMAIN].mean() for d in (0, 1)]),
        "pooled_accuracy": CORRECT.mean(),
        "balanced_accuracy": balanced_accuracy_score(LABEL, np.where(CORRECT, LABEL, (LABEL + 1) % 3)),
        "personal_accuracy": known.mean(),
        "personal_std": known.std(),
        "worst10_accuracy": worst,
        "gap": best - worst,
        "p10_accuracy": np.percentile(known, 10),
        "worst_accuracy": known.min(),
        "unseen_accuracy": OWN[N + 1 :].mean(),
    }
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(metrics.alike(DOMAIN) @ CORRECT, found["global_accuracy"], rtol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert of_table(tuned=True)["unseen_accuracy_tuned"] == pytest.approx(float(TUNED[N + 1 :].mean()))


def test_a_row_holds_the_metrics_of_its_scores_and_none_after_steps_that_were_not_taken():
    row = row_of(Scores(CORRECT, OWN, TUNED, None))
    assert {**of_table(), **of_table(tuned=True)}.items() <= row.items()
    assert row["global_accuracy"] == np.mean(list(row["per_domain"].values()))
    assert row["client_accuracies_tuned"][3] is None
    row = row_of(Scores(CORRECT, OWN, np.full(N + K, np.nan), None))
    assert not [name for name in row if name.endswith("_tuned")]


def test_clients_without_test_images_have_no_accuracy():
    nobody = np.full(N, np.nan)
    found = metrics.of(Evaluation(CORRECT, LABEL, DOMAIN, nobody, nobody[:K]))
    whole = {"global_accuracy", "pooled_accuracy", "balanced_accuracy"}
    assert {name for name, value in found.items() if value is not None} == whole


def test_a_metric_is_added_in_one_place(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, TOY))
    row = row_of(Scores(CORRECT, OWN, TUNED, None))
    value = 0.125 + 0.25 * np.nanmax(OWN[:N])
    assert row["toy"] == pytest.approx(value)
    assert row["toy_tuned"] == pytest.approx(0.125 + 0.25 * np.nanmax(TUNED[:N]))

    told, rows, holdings = make()
    for own in rows:
        own |= {"toy": value, "toy_tuned": value + 0.1}
    for name, entry in told["methods"].items():
        entry |= summary.summarise([own for own in rows if own["method"] == name], 0.7)
    assert told["methods"]["fedit"]["toy"]["last"]["mean"] == pytest.approx(value)
    shown = f"{100 * value:.1f}"
    text = summary.table(told)
    assert "toy!" in text
    assert text.count(f"{shown} ±0.0") == 2
    assert "toy!: a toy" in summary.meaning(told["config"])
    swept = [{"method": "fedit", "lr": 0.1, "value": None, "diverged": [], **told["methods"]["fedit"]}]
    assert f"{shown} ±0.0" in sweep.table(swept, None)
    page = Page(write(tmp_path, told, rows, holdings)).text
    assert "toy of all" in page
    assert "Toy of all: a toy." in page
    assert f"{shown} ± 0.0" in page
    (axes,) = figures.accuracies(styles_of(told), told).axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert {"toy of all", "toy of all,\nlocal steps"} <= set(labels)
