"""What a run would need is told without writing anything, and a run that does not fit is refused with what does."""

import dataclasses
import re
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bad_input import change

from experiments.cli import parse
from experiments.commands import compare
from experiments.config import Config
from experiments.engine import chunking, forecast, timed
from experiments.engine.forecast import Need, Scoring, Step
from experiments.setup import memory
from experiments.start import planned

GIB = 2**30
SMALL = (
    "--partition iid --clients 4 --holdout-clients 0 --minimum 2 --rounds 2 --seeds 1 --local-steps 2 --batch 4 "
    "--adapt-last 1 --chunk 4"
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    change()(folder / "data.npz")
    options = f"run --method ffa_lora --dry-run {SMALL} --data {folder / 'data.npz'} --out {folder / 'out'}"
    return planned(*parse(options.split()))[1].__self__


@pytest.mark.long
def test_a_dry_run_tells_and_writes_nothing(plan, capsys):
    assert isinstance(plan, compare.Plan)
    before = plan.trials["ffa_lora"].compile_seconds
    plan.forecast()
    assert plan.trials["ffa_lora"].compile_seconds == before, "no method is compiled"
    header, line, *_ = capsys.readouterr().out.splitlines()
    cells = dict(zip(re.split(r"\s{2,}", header), re.split(r"\s{2,}", line), strict=True))
    rank, width, classes = 4, 64, 3  # one block, query and value; of a pair only b moves, and the head
    moving = 2 * rank * width + (width + 1) * classes
    assert cells["method"] == "ffa_lora"
    assert int(cells["trained"].replace(",", "")) == moving
    assert cells["KiB up"] == cells["KiB down"] == f"{4 * moving / 1024:.1f}"
    assert all(float(cells[name]) > 0 for name in ("GFLOP/round", "compile s", "rounds s", "scores s"))
    parts = [float(cells[name]) for name in ("compile s", "rounds s", "scores s")]
    assert float(cells["run s"]) == pytest.approx(sum(parts), rel=0.02)
    assert not plan.folder.path.exists()


@pytest.mark.long
def test_a_step_is_timed_where_the_learning_rate_follows_rounds(plan):
    config = dataclasses.replace(plan.config, schedule="cosine")
    assert timed.one_step(config, plan.problem).seconds > 0


@pytest.mark.long
def test_memory_is_what_the_arrays_and_the_programs_take(plan):
    plan.trials["ffa_lora"].compile()
    needed = forecast.need(plan.trials["ffa_lora"])
    arrays = sum(x.nbytes for x in (*plan.problem.train, *plan.problem.test))
    assert arrays < needed.held < 2 * arrays + 4 * 10**6
    assert needed.work > 0
    assert needed.peak == needed.held + needed.work + needed.process
    if Path("/proc/self/status").exists():  # libraries and compiled programs are most of a small run
        assert needed.process > 100 * 2**20
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert needed.peak < 1.2 * used + needed.arrays


@pytest.mark.long
def test_a_run_that_does_not_fit_is_refused_before_its_first_round(plan, monkeypatch):
    trial = plan.trials["ffa_lora"]
    trial.compile()
    needed = forecast.need(trial)
    monkeypatch.setattr(memory, "available", lambda: needed.held + needed.work // 2 + 1)
    with pytest.raises(MemoryError, match=r"ffa_lora needs about .* MiB of memory .*--chunk 2 should fit"):
        plan.execute()
    assert not plan.folder.path.exists()
    monkeypatch.setattr(memory, "available", lambda: needed.arrays)
    assert forecast.too_large(plan.config, plan.problem, "ffa_lora", needed) is None


@pytest.mark.long
def test_memory_is_foretold_without_compiling_as_xla_tells_it_of_what_is_compiled(plan):
    """Of arrays, which is all that there is on an accelerator: what it computes with is at most a few MiB here."""
    plan.trials["ffa_lora"].compile()
    (own,) = forecast.foretell(plan.config, plan.problem, list(plan.trials.values())).methods
    needed = forecast.need(plan.trials["ffa_lora"])
    assert own.need.held == needed.held
    assert needed.work / 2 < own.need.work < 2 * needed.work + 2**20


def test_what_is_in_the_cache_of_programs_is_compiled_all_the_same():
    def lowered():
        return jax.jit(lambda x: jnp.tanh(x @ x) @ x).lower(jnp.ones((7, 7)))  # each time another of the same text

    hits = lambda: [event for event in seen if event.endswith("cache_retrieval_time_sec")]
    seen: list[str] = []
    listen = lambda event, duration_secs, **_: seen.append(event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        lowered().compile()
        for _ in range(2):
            seen.clear()
            compiled, found = timed._compile(time.perf_counter, lowered())
            assert not hits()
            assert found.letters == len(lowered().as_text())
            assert found.seconds > 0
        seen.clear()
        lowered().compile()
        assert hits() or not jax.config.jax_compilation_cache_dir, "after that it is asked again"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    np.testing.assert_allclose(compiled(np.eye(7, dtype=np.float32)), np.tanh(1) * np.eye(7), rtol=1e-5)


@pytest.mark.parametrize(
    ("have", "advice"),
    [(9, "--seeds-at-once 1 --chunk 8"), (4, "--seeds-at-once 1 --chunk 4"), (2, "--seeds-at-once 1 --chunk 1"),
     (1.1, "even one client")],
)  # fmt: skip
def test_first_fewer_seeds_are_advised_then_fewer_clients(monkeypatch, have, advice):
    monkeypatch.setattr(chunking, "choose", lambda config, problem: (8, 2))
    monkeypatch.setattr(memory, "available", lambda: have * GIB)
    config, problem = Config(clients=8, seeds=(0, 1)), SimpleNamespace(keys=np.zeros(2))
    text = forecast.too_large(config, problem, "fedit", Need(GIB, 12 * GIB))  # type: ignore[arg-type]
    assert advice in text
    assert "needs about 13.00 GiB" in text
    assert f"{have:.2f} GiB" in text


@pytest.mark.parametrize("novel", [(), ("half",)])
@pytest.mark.parametrize("onboard", [None, "a trial"])
@pytest.mark.parametrize(("rounds", "every"), [(10, 1), (12, 4), (3, 3), (40, 2)])
def test_time_is_that_of_all_that_is_computed_one_after_another(novel, onboard, rounds, every):
    """Counted once more, round by round; a step of 4 clients takes 2 s, so one client's half a second."""
    config = Config(
        clients=30,
        holdout_clients=7,
        local_steps=5,
        rounds=rounds,
        eval_every=every,
        seeds=(0, 1),
        devices=2,
        novel=novel,
    )
    own = 0.1 + 11.0 * bool(novel)  # every model on its client's own images, and on all
    step, scoring, passes = Step(4, 2.0, 1.0), Scoring(whole=11.0, own=0.1), 30 * 6.0
    training = evaluation = 0.0
    for r in range(1, rounds + 1):
        training += passes * 0.5 / 2  # shared by two devices
        if r % every == 0:
            evaluation += 11.0 + 19 * own + (4 * 5 * 0.5 if onboard else 0.0)  # of 37 clients, 7 of them unseen
            evaluation += 19 * (5 * 0.5 + own) if r > rounds - 5 else 0.0
    found = forecast.seconds(config, SimpleNamespace(onboard=onboard), step, scoring, passes)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, (2 * training, 2 * evaluation))


def test_where_memory_is_unknown_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: None)
    assert forecast.too_large(Config(), None, "fedit", Need(GIB, GIB)) is None  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "available", lambda: 0)
    assert forecast.too_large(Config(), None, "fedit", None) is None  # type: ignore[arg-type]


def test_a_cpu_has_what_is_free_and_what_our_arrays_hold():
    assert memory.available() is None or memory.available() > 2**20
