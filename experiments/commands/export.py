"""The models of a finished run, for other tools: weights with everything folded in, or the adapter's own arrays.

A model is what the method last sends, base and adapter, as it is evaluated: the global one goes to nobody in particular
(``method.average_client``), a client's own to that client with what it keeps. Folded into the weights it is exact for
every method, whatever its server holds.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from experiments.commands import compare, prelude
from experiments.config import Config, Export, check_fields
from experiments.engine import methods, programs
from experiments.engine.chunking import choose
from experiments.engine.evaluation import make_serving
from experiments.engine.facts import facts_of
from experiments.results.folder import CONFIG, Folder, read_json, say, write_atomically
from experiments.setup import backbone as backbones
from experiments.setup.local_training import make_optimizer
from experiments.setup.problem import Problem, Seed
from experiments.setup.task import STEM
from fedlora_jax import lora
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import Method, average_client, models
from fedlora_jax.rounds import Run
from models.backbone import Published


class Model(NamedTuple):
    """What one receiver computes with."""

    name: str
    base: Params  # shared by all
    adapter: Adapter  # without switches


class Plan:
    """Models of a run that was found whole, on the data and weights that it was computed with."""

    def __init__(self, options: Export):
        check_fields(options)
        command, config = recorded(Path(options.run))
        self.options, self.method = options, _chosen(options.method, config)
        self.seed = config.seeds[0] if options.seed is None else options.seed
        if self.seed not in config.seeds:
            raise ValueError(f"the run has the seeds {','.join(map(str, config.seeds))}: got --seed {self.seed}")
        ids = _clients(options.model, config.clients + config.holdout_clients)
        prelude.checked(config)
        self.folder = Folder("export", options.out)
        self.config, self.problem = config, _same_problem(command, config)
        self.top = backbones.cut(self.problem.backbone, config.adapt_last)[1]
        if self.top.publish is None and config.adapt_last is not None:
            raise ValueError(
                f"{self.problem.backbone.name} was cut before its last {config.adapt_last} blocks, and what "
                "that leaves does not say how the whole is published: give it a Backbone.publish"
            )
        method, own, run = restored(config, self.problem, self.method, self.seed)
        self.models = served(config, self.problem, method, own, run, ids)

    def execute(self) -> None:
        """Write a file for each model, and say which."""
        with self.folder as folder:
            for model in self.models:
                path = self._write(folder, model)
                print(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MB)", flush=True)

    def _write(self, folder: Path, model: Model) -> Path:
        to = self.options.to
        if to != "merged" and (names := changed(self.problem.base, model.base)):
            to = "merged"
            say(
                f"{model.name} of {self.method} is more than an adapter: what is sent has other weights in "
                f"{', '.join(names[:2])}{' ...' * (len(names) > 2)}; it is written merged"
            )
        content = self.merged(model) if to == "merged" else self.arrays(model)
        path = folder / f"{model.name}.{'safetensors' if to == 'merged' else to}"
        write_atomically(path, content)
        return path

    def merged(self, model: Model) -> bytes:
        """The whole model as a ``.safetensors`` that ``--weights`` reads: published names, facts as metadata."""
        params = lora.merge(model.base, model.adapter)
        params = {name: x for name, x in params.items() if name != STEM}
        publish = self.top.publish or (lambda params: Published(lora.flatten(params), {}))
        arrays, said = publish(params)
        arrays = {name: np.asarray(x, np.float32, order="C") for name, x in arrays.items()}
        return save(arrays, {name: json.dumps(x) for name, x in {**said, **self._said(model)}.items()})

    def arrays(self, model: Model) -> bytes:
        """The adapter as a ``.npz``: ``NAME/a [..., in, rank]``, ``NAME/b [..., rank, out]``, full differences by name.

        ``meta`` (JSON) has the factor of each update, the weights it belongs to, and the first adapted block.
        """
        flat, buffer = lora.flatten(model.adapter), io.BytesIO()
        low_rank = {name: x for name, x in flat.items() if lora.is_lora(x)}
        arrays = {f"{name}/{factor}": getattr(x, factor) for name, x in low_rank.items() for factor in "ab"}
        arrays |= {name: x for name, x in flat.items() if name not in low_rank}
        meta = {
            "computes": "x @ (W + scale * a @ b), and for names without a and b W + difference",
            "scale": {name: x.scale for name, x in low_rank.items()},
            "rank": {name: x.a.shape[-1] for name, x in low_rank.items()},
            "first_block": self.problem.backbone.depth - self.top.depth,
            "weights_hash": self.problem.record["weights_hash"],
            **self._said(model),
        }
        np.savez(buffer, meta=json.dumps(meta), **jax.device_get(arrays))
        return buffer.getvalue()

    def _said(self, model: Model) -> dict[str, Any]:
        run = {"method": self.method, "receiver": model.name, "seed": self.seed, "rounds": self.config.rounds}
        return {"classes": list(self.problem.images.classes), "weights": self.problem.backbone.name, "run": run}


def recorded(run: Path) -> tuple[str, Config]:
    """The command and the options of a run, as its folder has them; of those that decide speed the defaults.

    Raises:
      ValueError: it is no folder of ``compare`` or ``run``.
    """
    path = run / CONFIG
    content = read_json(path.read_bytes()) if path.is_file() else None
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ValueError(f"no run in {run}: expected a folder that compare or run has written, with a {CONFIG}")
    command, fields = content.get("command"), {field.name for field in dataclasses.fields(Config)}
    if command not in ("compare", "run"):
        raise ValueError(f"{run} is of {command}, which keeps no models: expected a folder of compare or run")
    tuples = lambda x: tuple(x) if isinstance(x, list) else x
    held = {name: tuples(x) for name, x in content["config"].items() if name in fields}
    return command, Config(**{**held, "out": str(run), "prefix": "anew"})


def restored(config: Config, problem: Problem, name: str, seed: int) -> tuple[Method, Seed, Run]:
    """A method of a finished run, one of its seeds, and the run of it after the last round.

    Raises:
      ValueError: there is no whole checkpoint of that round.
    """
    place = config.seeds.index(seed)
    found = compare.stores(config, problem, Path(str(config.out)), name)
    (start, stop), store = next((span, store) for span, store in found.items() if span[0] <= place < span[1])
    whole, wrong = store.whole()
    if config.rounds not in whole:
        done = f"its last whole checkpoint is after round {max(whole)}" if whole else "it has no whole checkpoint"
        why = f" ({wrong[0]})" if wrong else ""
        raise ValueError(
            f"{name} is not finished on seed {seed}: {done} of {config.rounds}{why}; go on with --out {config.out} "
            "--resume"
        )
    method = methods.build(name, **facts_of(config, problem.signature))
    part = dataclasses.replace(config, seeds=config.seeds[start:stop])
    begin = programs.make(part, problem, method).start
    together = store.restore(
        config.rounds, begin(jax.tree.map(lambda x: x[start:stop], problem.adapters), problem.keys[start:stop])
    )
    one = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    return method, one(problem.everyone(), place), one(together, place - start)


def served(config: Config, problem: Problem, method: Method, seed: Seed, run: Run, ids: list[int]) -> list[Model]:
    """The models of these clients, or of nobody in particular (-1), as they are evaluated before local steps.

    Raises:
      ValueError: one of them is not its weights alone.
    """
    n, population = config.clients, seed.clients.population
    serving = make_serving(config, problem, method, make_optimizer(config), choose(config, problem)[0])
    onboard = any(i >= n for i in ids)
    memory = jax.jit(serving.onboard)(problem.arrays(), seed, run) if onboard else run.memory
    nobody = average_client(seed.clients.training(n).cohort(jnp.arange(n), run.memory))
    clients = [i for i in ids if i >= 0]
    cohorts = [(["global"], nobody)] if -1 in ids else []
    if clients:
        cohorts.append(([f"client-{i}" for i in clients], population.cohort(jnp.asarray(clients), memory)))
    made = []
    for names, cohort in cohorts:
        sent = method.dispatch(problem.base, run.state, cohort)
        rows = jax.device_get(models(method, sent))
        for i, name in enumerate(names):
            adapter = _without_switches(name, sent.base, jax.tree.map(lambda x, i=i: x[i], rows))
            made.append(Model(name, sent.base, adapter))
    return made


def changed(base: Params, sent: Params) -> list[str]:
    """Names of the arrays that differ."""
    before = lora.flatten(base)
    return [name for name, x in lora.flatten(sent).items() if x is not before[name] and (x != before[name]).any()]


def _without_switches(name: str, base: Params, adapter: Adapter) -> Adapter:
    flat, known = lora.flatten(adapter), lora.flatten(base).keys()
    for switch in flat.keys() - known:
        if not (np.asarray(flat[switch]) == 1).all():
            raise ValueError(
                f"the model of {name} leaves blocks out ({switch}), which no weights say: export --model global"
            )
    return lora.unflatten({key: x for key, x in flat.items() if key in known})


def _chosen(method: str | None, config: Config) -> str:
    if method is None and len(config.methods) == 1:
        return config.methods[0]
    if method not in config.methods:
        got = "say which with --method" if method is None else f"got --method {method}"
        raise ValueError(f"{config.out} is a run of {', '.join(config.methods)}: {got}")
    return method


def _clients(model: str, total: int) -> list[int]:
    """Rows of clients that a text names; -1 is nobody in particular."""
    if model == "global":
        return [-1]
    if model == "all":
        return [-1, *range(total)]
    match = re.fullmatch(r"client:(\d{1,9})", model)
    if match is None or int(match[1]) >= total:
        raise ValueError(f"--model must be global, all or client:ID with ID from 0 to {total - 1}; got {model}")
    return [int(match[1])]


def _same_problem(command: str, config: Config) -> Problem:
    """The problem of a run, built again.

    Raises:
      ValueError: data, weights or clients are not what they were.
    """
    folder = Folder(command, config.out, resume=True)
    problem = prelude.built(config)
    try:
        prelude.going_on(folder, prelude.about(command, config, problem))
    except ValueError as error:
        raise ValueError(f"cannot export what was computed with other data, weights or code: {error}") from None
    return problem
