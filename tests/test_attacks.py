"""Malicious clients: what they send and train on, by NumPy in float64; where nobody is one nothing changes."""

import json

import jax
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLASSES,
    KEY,
    assert_near,
    cohort,
    jit,
    loss_fn,
    members,
    normalised,
    nudged,
    replaced,
)
from input_helpers import PLAIN, SMALL, change
from scipy import stats
from wrapper_helpers import SGD, flat

from experiments import attack as typed
from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.config import Config, check
from fedlora_jax import attacks, rounds
from fedlora_jax.batches import Padded
from fedlora_jax.clients import Population
from fedlora_jax.methods.centralized import centralized
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.fedsa_lora import fedsa_lora

BAD, RANKS, WEIGHTS = np.float32([0, 1, 0, 1, 0, 0]), [2, 2, 1, 1, 2, 1], [1, 2, 3, 1, 0, 2]  # one never answers


def people(method):
    return normalised(members(method, clients=6, ranks=RANKS, weights=WEIGHTS))._replace(malicious=BAD)


def arrived(attack, method=None, key=KEY):
    """``(updates, held, sent updates)`` as numbers ``[C, n]``: of honest training, and of what arrives."""
    method, c = method or fedit(), people(method or fedit())
    sent = method.dispatch(BASE, method.init(KEY, ADAPTER), c)
    moved = nudged(jax.tree.map(np.zeros_like, sent.adapter), 1)
    received = jax.tree.map(lambda x, m, d: np.asarray(x + m * d), sent.adapter, sent.mask, moved)
    new, _ = attacks.sent_by(attack, method, c, sent, received, (), key)
    held = jax.tree.map(lambda x, m: np.broadcast_to(m, x.shape), sent.adapter, method.upload_mask(sent.mask))
    start, before, after, held = (flat(x, clients=True) for x in (sent.adapter, received, new, held))
    assert (after[BAD == 0] == before[BAD == 0]).all()
    assert (after[held == 0] == before[held == 0]).all()
    return (before - start) * held, held, (after - start) * held


def mean_of(d, held, who):
    w = held * np.asarray(who, float)[:, None]
    return (w * d).sum(0) / np.maximum(w.sum(0), 1)


GOOD = (BAD == 0) & (np.asarray(WEIGHTS) > 0)
SENT = {
    "sign_flip": (attacks.sign_flip(2.0), lambda d, h: -2 * d),
    "ipm": (attacks.ipm(0.5), lambda d, h: -0.5 * mean_of(d, h, GOOD) * h),
    "alie": (
        attacks.alie(1.5),
        lambda d, h: (m := mean_of(d, h, GOOD)) * h - 1.5 * np.sqrt(mean_of((d - m) ** 2, h, GOOD)) * h,
    ),
    "collusion": (attacks.collusion(3.0), lambda d, h: -3 * mean_of(d, h, BAD) * h),
    "free_rider": (attacks.free_rider(), lambda d, h: 0 * d),
    "backdoor": (attacks.backdoor(boost=4.0), lambda d, h: 4 * d),
}


@pytest.mark.parametrize("name", SENT)
def test_what_malicious_clients_send_is_what_the_papers_say(name):
    """Of ranks 1 and 2, over those who hold an entry; the others, and what is not shared, stay to the bit."""
    attack, expected = SENT[name]
    for method in (fedit(), fedsa_lora()):
        d, held, sent = arrived(attack, method)
        np.testing.assert_allclose(sent[BAD > 0], expected(d, held)[BAD > 0], atol=2e-6)


def test_gaussian_noise_is_as_large_as_asked_for_and_of_each_round_its_own():
    d, held, sent = arrived(attacks.gaussian(3.0))
    _, _, again = arrived(attacks.gaussian(3.0), key=jax.random.key(1))
    bad = (BAD > 0)[:, None] & (held > 0)
    assert 0.7 < np.sqrt((sent[bad] ** 2).sum() / (9 * d[bad] ** 2).sum()) < 1.4
    assert abs(stats.pearsonr(sent[bad], again[bad])[0]) < 0.4
    assert abs(stats.pearsonr(sent[bad], d[bad])[0]) < 0.4


@pytest.mark.long
def test_a_round_in_which_nobody_is_malicious_is_the_plain_one_and_what_is_no_number_is_left_out():
    method, c = fedit(), members(fedit())
    loud = attacks.Attack(craft=lambda key, seen: jax.tree.map(lambda d: d + np.inf, seen.updates))
    plain, attacked = (jit(rounds.make_round(method, loss_fn, SGD, attack=attack)) for attack in (attacks.NOBODY, loud))
    start = BASE, method.init(KEY, ADAPTER)
    none = attacked(*start, c._replace(malicious=np.zeros(4, np.float32)), KEY)
    assert_near(none, plain(*start, c, KEY), 0)
    state, _, info = attacked(*start, c._replace(malicious=np.float32([0, 1, 0, 0])), KEY)
    assert info.dropped == 1
    expected, *_ = plain(*start, c._replace(weights=replaced(c.weights, 1, 0.0)), KEY)
    assert_near(state, expected, 1e-6)


def test_meta_gradients_are_attacked_as_adapters_are():
    method, c = fedit(), people(fedit())
    sent = method.dispatch(BASE, method.init(KEY, ADAPTER), c)
    told = {"w": np.random.default_rng(0).normal(size=(6, 3, 2)).astype(np.float32)}
    _, arrived = attacks.sent_by(attacks.ipm(0.5), method, c, sent, sent.adapter, told, KEY)
    assert (arrived["w"][BAD == 0] == told["w"][BAD == 0]).all()
    np.testing.assert_allclose(arrived["w"][BAD > 0], -0.5 * np.stack([told["w"][GOOD].mean(0)] * 2), rtol=1e-5)


def test_data_of_malicious_clients_alone_are_changed():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (6, 2, 3, 5, 5, 3), np.uint8), rng.integers(0, 10, (6, 2, 3))
    c = people(fedit())._replace(batches=Padded((x, y), np.ones(y.shape, bool)), queries=(x[:, 0], y[:, 0]))
    turned = attacks.poisoned(attacks.label_flip(10), c)
    good, bad = BAD == 0, BAD > 0
    for (_, labels), before in ((turned.batches.examples, y), (turned.queries, y[:, 0])):
        np.testing.assert_array_equal(labels[good], before[good])
        np.testing.assert_array_equal(labels[bad], 9 - before[bad])
    marked, labels = attacks.poisoned(attacks.backdoor(target=7, side=2, of_batch=0.5), c).batches.examples
    assert (marked[good] == x[good]).all()
    assert (labels[good] == y[good]).all()
    expected, said = x.copy(), y.copy()
    expected[bad, :, :2, -2:, -2:] = 255
    said[bad, :, :2] = 7  # two of three, rounded up
    np.testing.assert_array_equal(marked, expected)
    np.testing.assert_array_equal(labels, said)
    with pytest.raises(ValueError, match=r"puts a square on images .*, and examples have shape \(5,\)"):
        attacks.poisoned(attacks.backdoor(), c._replace(batches=(x[..., 0, 0], y)))
    with pytest.raises(ValueError, match=r"examples \(inputs, labels\), got dict"):
        attacks.poisoned(attacks.label_flip(CLASSES), people(fedit()))


def test_of_pooled_data_nobody_sends_an_update():
    method = centralized()
    c = attacks.poisoned(attacks.sign_flip(), members(method)._replace(malicious=np.ones(4, np.float32)))
    assert attacks.sent_by(attacks.sign_flip(), method, method.pool(c), None, "received", (), KEY) == ("received", ())


def test_an_attack_is_somebodys():
    with pytest.raises(ValueError, match=r"give Population\(malicious="):
        attacks.poisoned(attacks.sign_flip(), cohort())
    everyone = Population(*np.ones((3, 5), int), malicious=np.eye(5, dtype=np.float32)[3])
    assert everyone.members(np.array([4, 3])).cohort(np.arange(2), ()).malicious.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sign", "unknown attack 'sign': did you mean sign_flip"),
        ("sign_flip:share=1", r"share must be at least 0 and below 1, got 1"),
        ("sign_flip:share=0.01", "share 0.01 of 12 clients is 0 of them"),
        ("sign_flip:share=0.99", "share 0.99 of 12 clients is 12 of them"),
        ("sign_flip:size=2", r"'size=2' is no option of sign_flip; it has share=0.2, scale=1.0"),
        ("sign_flip:scale=-1", "--attack sign_flip:scale=-1: scale must be above 0"),
        ("backdoor:of_batch=0", "of_batch must be above 0"),
        ("alie:z=1:z=2", "more than once"),
    ],
)
def test_what_is_typed_is_refused_before_data_are_read(text, said):
    with pytest.raises(ValueError, match=said):
        check(Config(attack=text))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": "staged"}, "a backdoor is scored on all test images"),
        ({"kept": "staged"}, "a backdoor is scored at once"),
        ({"adapt_last": 1}, "use --prefix anew"),
    ],
)
def test_a_backdoor_needs_images(changes, said):
    with pytest.raises(ValueError, match=said):
        check(Config(attack="backdoor", **changes))


def test_every_seed_draws_its_own_and_the_options_are_those_of_the_attack():
    one, other = (typed.drawn("alie:share=0.25", 12, seed) for seed in (0, 1))
    assert len(set(one)) == len(set(other)) == 3
    assert set(one) != set(other)
    assert Config(attack="alie:share=0.25").scored == (9, 6)
    assert Config(attack="alie:share=0.25", eval_clients=4).scored == (4, 4)
    assert Config(attack="alie:share=0").scored == Config().scored
    with pytest.raises(ValueError, match="target 3 is none of 3 classes"):
        typed.build("backdoor:target=3", 3)
    labels = typed.build("label_flip", 3).poison((None, np.arange(3)))[1]
    assert labels.tolist() == [2, 1, 0]


@pytest.mark.long
def test_a_run_under_attack_scores_the_honest_and_counts_how_often_a_backdoor_opens(tmp_path):
    change()(tmp_path / "data.npz")
    out = tmp_path / "out"
    words = [*SMALL, *PLAIN, "--data", str(tmp_path / "data.npz"), "--partition", "iid", "--out", str(out)]
    words += ["--clients", "4", "--seeds", "0:2", "--attack", "backdoor:share=0.25:boost=5"]
    Plan("run", parse(["run", "--method", "fedit", *words])[1]).execute()
    held, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    bad = [typed.drawn(held["config"]["attack"], 4, seed).tolist() for seed in (0, 1)]
    assert held["record"]["malicious"] == bad
    last = [row for row in rows if "client_numbers" in row]
    assert [sorted({0, 1, 2, 3} - set(row["client_numbers"])) for row in last] == bad
    for row in last:
        assert 0 <= row["backdoor_success"] <= 1
        assert len(row["client_accuracies"]) == 3
        assert not any(name.endswith("_error") for name in row)
    own = summary["methods"]["fedit"]["backdoor_success"]["last"]["seeds"]
    assert own == [row["backdoor_success"] for row in last]
    page = (out / "report.html").read_text()
    assert "1 of those that train attack by backdoor" in page
    assert "backdoor success" in page
