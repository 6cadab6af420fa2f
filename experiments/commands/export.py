"""The models of a finished run, for other tools: weights with everything folded in, or an adapter (PEFT, or arrays).

A model is what the method last sends, base and adapter, as it is evaluated: the global one goes to nobody in particular
(``method.average_client``), a client's own to that client with what it keeps. Folded into the weights it is exact for
every method, whatever its server holds; an adapter is exact too, or is not written.
"""

from __future__ import annotations

import bisect
import dataclasses
import io
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from experiments.commands import compare, prelude
from experiments.config import Config
from experiments.engine import methods, programs
from experiments.engine.chunking import choose
from experiments.engine.evaluation import make_serving
from experiments.engine.facts import facts_of
from experiments.engine.staging import arrays_of_trials
from experiments.options import check_fields
from experiments.requests import Export
from experiments.results.folder import CONFIG, Folder, read_json, say, write_atomically
from experiments.setup import backbone as backbones
from experiments.setup.local_training import make_optimizer
from experiments.setup.option_values import from_file
from experiments.setup.problem import Problem, Seed
from experiments.setup.task import STEM
from fedlora_jax import lora
from fedlora_jax.lora import Adapter, LoRA, Params
from fedlora_jax.method import Cohort, Method, average_client, models
from fedlora_jax.rounds import Run
from models import peft
from models.backbone import Backbone, Layout, Published
from models.files import SINGLE


class Model(NamedTuple):
    """What one receiver computes with."""

    name: str
    base: Params  # shared by all
    adapter: Adapter  # without switches


class Plan:
    """Models of a run that was found whole, on the data and weights that it was computed with."""

    def __init__(self, options: Export):
        check_fields(options)
        if options.layout is not None and options.to != "peft":
            raise ValueError(f"--layout {options.layout} is of --to peft: leave it out, or use --to peft")
        command, config = recorded(Path(options.run))
        self.options, self.method = options, chosen(options.method, config)
        self.seed = config.seeds[0] if options.seed is None else options.seed
        if self.seed not in config.seeds:
            raise ValueError(f"the run has the seeds {','.join(map(str, config.seeds))}: got --seed {self.seed}")
        ids = _clients(options.model, config.clients + config.holdout_clients)
        prelude.checked(config)
        learned = {"a head of cosines (--head cosine)": config.head == "cosine"}
        learned |= {"a gate (--head gate)": config.head == "gate"}
        learned |= {"learned vectors (--context)": config.context is not None}
        own = [what for what, is_so in learned.items() if is_so]
        if own and (options.to != "npz" or config.adapt_last is not None):
            raise ValueError(
                f"--to {options.to}: no published layout has {own[0]}, so what was learned leaves by --to npz alone, "
                "and there from a run without --adapt-last"
            )
        self.folder = Folder("export", options.out)
        self.config, self.problem = config, same_problem(command, config)
        self.top = backbones.cut(self.problem.backbone, config.adapt_last)[1]
        if self.top.publish is None and config.adapt_last is not None:
            raise ValueError(
                f"{self.problem.backbone.name} was cut before its last {config.adapt_last} blocks, and what "
                "that leaves does not say how the whole is published: give it a Backbone.publish"
            )
        self.layout = _layout(options, self.top)
        method, own, run = restored(config, self.problem, self.method, self.seed)
        self.models = served(config, self.problem, method, own, run, ids)

    def execute(self) -> None:
        """Write a file or folder for each model, and say which."""
        with self.folder as folder:
            for model in self.models:
                files = self._files(model)
                for name, content in files.items():
                    (folder / name).parent.mkdir(exist_ok=True)
                    write_atomically(folder / name, content)
                size, path = sum(map(len, files.values())) / 2**20, folder / next(iter(files))
                path = path.parent if len(files) > 1 else path
                base = self.layout.base.format(classes=len(self.problem.images.classes))
                use = f", for {base}" if f"{model.name}/{peft.CONFIG}" in files else ""
                print(f"wrote {path} ({size:.2f} MB){use}", flush=True)

    def _files(self, model: Model) -> dict[str, bytes]:
        """Contents by path in the folder, as asked for where that is exact, else the merged weights."""
        whole = self.merged(model)
        if self.options.to == "merged":
            return whole
        published, brought = as_published(self.config, self.problem, self.top)
        about, (adapter, beyond) = f"{model.name} of {self.method} is", as_adapter(published, model, brought)
        if beyond:
            say(
                f"{about} more than an adapter: what is sent has other weights in {_some(beyond)}, and not of a low "
                "rank; it is written merged"
            )
            return whole
        if changed(self.problem.base, model.base):
            say(f"{about} more than its adapter, and exactly one of rank {lora.max_rank(adapter)}")
        if self.options.to == "npz":
            return {f"{model.name}.npz": self.arrays(model._replace(adapter=adapter))}
        base = {name: x for name, x in published.items() if name != STEM}
        if names := peft.unheld(self.layout, base, adapter):
            say(f"{about} more than PEFT holds, it trains {_some(names)} as well; it is written merged")
            return whole
        files = peft.files_of(self.layout, base, adapter, self._said(model))
        return {f"{model.name}/{name}": content for name, content in files.items()}

    def merged(self, model: Model) -> dict[str, bytes]:
        """The whole model as a ``.safetensors`` that ``--weights`` reads, or a folder with one, by path.

        Names are published ones, facts stand in its metadata, and beside it where such names have a place for them.
        """
        params = lora.merge(model.base, model.adapter)
        params = {name: x for name, x in params.items() if name != STEM}
        publish = self.top.publish or (lambda params: Published(lora.flatten(params), {}))
        arrays, said, beside = publish(params)
        arrays = {name: np.asarray(x, np.float32, order="C") for name, x in arrays.items()}
        told = {name: json.dumps(x) for name, x in {**said, **self._said(model)}.items()}
        if not beside:
            return {f"{model.name}.safetensors": save(arrays, told)}
        files = {SINGLE: save(arrays, {"format": "pt", **told})}
        return {f"{model.name}/{name}": content for name, content in {**files, **beside}.items()}

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
    hints = typing.get_type_hints(Config)
    held = {name: x for name, x in content["config"].items() if name in fields}
    held = {name: None if x is None else from_file(str(path), name, x, hints[name]) for name, x in held.items()}
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
    method = methods.build(name, **facts_of(config, problem.signature, min(problem.fewest)))
    part = dataclasses.replace(config, seeds=config.seeds[start:stop])
    begin = programs.make(part, problem, method).start
    like = begin(jax.tree.map(lambda x: x[start:stop], problem.adapters), problem.keys[start:stop])
    together = jax.tree.map(jnp.asarray, store.restore(config.rounds, like))
    one = jax.jit(lambda tree, i: jax.tree.map(lambda x: x[i], tree))
    return method, one(problem.everyone(), place), one(together, place - start)


def served(config: Config, problem: Problem, method: Method, seed: Seed, run: Run, ids: list[int]) -> list[Model]:
    """The models of these clients, or of nobody in particular (-1), as they are evaluated before local steps.

    Raises:
      ValueError: one of them is not its weights alone.
    """
    config, seed = (
        dataclasses.replace(config, eval_clients=None),
        seed._replace(clients=seed.clients._replace(scored=())),
    )
    n, population = config.clients, seed.clients.population
    serving = make_serving(config, problem, method, make_optimizer(config), choose(config, problem)[0])
    onboard = any(i >= n for i in ids)
    shown = arrays_of_trials(problem, serving, seed, run) if onboard else None
    memory = jax.jit(serving.onboard)(*shown, run) if shown else run.memory
    nobody = average_client(seed.clients.training(n).cohort(jnp.arange(n), run.memory))
    clients = [i for i in ids if i >= 0]
    cohorts = [(["global"], nobody)] if -1 in ids else []
    if clients:
        cohorts.append(([f"client-{i}" for i in clients], population.cohort(jnp.asarray(clients), memory)))

    @jax.jit
    def received(base: Params, state: Any, cohort: Cohort) -> tuple[Params, Adapter]:
        sent = method.dispatch(base, state, cohort)
        return sent.base, models(method, sent)

    made = []
    for names, cohort in cohorts:
        made += of_receivers(names, *received(problem.base, run.state, cohort))
    return made


def of_receivers(names: Sequence[str], base: Params, adapters: Adapter) -> list[Model]:
    """What each of these computes with, of what is sent to all and of their adapters ``[C, ...]``.

    Raises:
      ValueError: one of them is not its weights alone.
    """
    rows = jax.device_get(adapters)
    row = lambda i: jax.tree.map(lambda x: x[i], rows)
    return [Model(name, base, _without_switches(name, base, row(i))) for i, name in enumerate(names)]


def as_published(config: Config, problem: Problem, top: Backbone) -> tuple[Params, list[str]]:
    """The frozen parameters as the weights have them, and names of those that ``--adapter`` came with others of."""
    flat = lora.flatten(problem.base)
    own = lora.flatten(backbones.kept_as(config.base_dtype, top.params, config.full))
    brought = [name for name, x in own.items() if (np.asarray(x) != np.asarray(flat[name])).any()]
    return lora.unflatten(flat | {name: own[name] for name in brought}), brought


def as_adapter(base: Params, model: Model, full: Sequence[str] = ()) -> tuple[Adapter, list[str]]:
    """An adapter of ``base`` that is the model, and names of the arrays for which there is none.

    Arrays in ``full`` that differ become plain differences.

    What is sent in place of the base differs from it by a low-rank update only if that is so to the rounding of the
    weights: nothing is left out of it that float32 tells from nothing.
    """
    flat, beyond = lora.flatten(model.adapter), []
    before, now = lora.flatten(base), lora.flatten(model.base)
    for name in (others := changed(base, model.base)):
        difference = np.asarray(now[name], float) - np.asarray(before[name], float)
        rounding = float(np.finfo(np.float32).eps * np.abs(now[name]).max())
        if name in flat and not lora.is_lora(flat[name]):
            flat[name] = flat[name] + jnp.asarray(difference, jnp.float32)
        elif name in full and name not in flat:
            flat[name] = jnp.asarray(difference, jnp.float32)
        elif (found := _factors(difference, rounding)) is None:
            beyond.append(name)
        else:
            flat[name] = _joined(flat.get(name), *found)
    return (lora.unflatten(flat) if others else model.adapter), beyond


def _joined(own: LoRA | None, a: np.ndarray, b: np.ndarray) -> LoRA:
    """An update and one more, of the sum of their ranks."""
    if own is None:
        return LoRA(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    a, b = np.concatenate([own.a, a / own.scale], -1), np.concatenate([own.b, b], -2)
    return LoRA(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), own.scale)


def _factors(x: Any, tolerance: float) -> tuple[np.ndarray, np.ndarray] | None:
    """``a [..., in, rank]`` and ``b [..., rank, out]`` whose product is ``x [..., in, out]``, of fewer numbers.

    ``None``: no such rank leaves entries within ``tolerance`` of what they are.
    """
    if x.ndim < 2:
        return None
    u, s, v = np.linalg.svd(x, full_matrices=False)
    most = min((x.shape[-2] * x.shape[-1] - 1) // (x.shape[-2] + x.shape[-1]), s.shape[-1])
    factors = lambda rank: (u[..., :rank] * s[..., None, :rank], v[..., :rank, :])
    close = lambda rank: bool(np.abs(np.matmul(*factors(rank)) - x).max() <= tolerance)
    rank = 1 + bisect.bisect_left(range(1, most + 1), True, key=close)
    return factors(rank) if rank <= most else None


def changed(base: Params, sent: Params) -> list[str]:
    """Names of the arrays that differ."""
    before = lora.flatten(base)
    return [name for name, x in lora.flatten(sent).items() if x is not before[name] and (x != before[name]).any()]


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:2])}{' ...' * (len(names) > 2)}"


def _layout(options: Export, backbone: Backbone) -> Layout:
    """Whose names the modules have."""
    name, known = options.layout, backbone.layouts
    if options.to != "peft":
        return Layout({}, "")
    if not known:
        raise ValueError(
            f"{backbone.name} does not say by which names PyTorch knows its layers (Backbone.layouts), and PEFT goes "
            "by them: use --to merged or npz"
        )
    if name is not None and name not in known:
        raise ValueError(f"--layout must be one of {', '.join(known)} for these weights; got {name}")
    return known[name or next(iter(known))]


def _without_switches(name: str, base: Params, adapter: Adapter) -> Adapter:
    flat, known = lora.flatten(adapter), lora.flatten(base).keys()
    for switch in flat.keys() - known:
        if switch.endswith("mixer"):
            raise ValueError(
                f"the model of {name} weighs its updates by their input ({switch}), which no weights say: export "
                "another method's, or keep the run's checkpoint"
            )
        if not (np.asarray(flat[switch]) == 1).all():
            raise ValueError(
                f"the model of {name} leaves blocks out ({switch}), which no weights say: export --model global"
            )
    return lora.unflatten({key: x for key, x in flat.items() if key in known})


def chosen(method: str | None, config: Config) -> str:
    """The method of a run that is meant.

    Raises:
      ValueError: it has several, or none of that name.
    """
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


def same_problem(command: str, config: Config) -> Problem:
    """The problem of a run, built again.

    Raises:
      ValueError: data, weights or clients are not what they were.
    """
    folder = Folder(command, config.out, resume=True)
    problem = prelude.built(config, may_stage=True)
    try:
        prelude.going_on(folder, prelude.about(command, config, problem))
    except ValueError as error:
        raise ValueError(f"cannot go by what was computed with other data, weights or code: {error}") from None
    return problem
