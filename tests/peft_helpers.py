"""What PEFT computes with a folder, from its documentation, in float64 NumPy; and random adapters."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

import fedlora_jax as fl
from fedlora_jax import Population, lora, make_round, make_step, rounds, scan_rounds

PREFIX = "base_model.model."


def folder(path, files):
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def of_module(config, name, usual, pattern):
    """What a pattern says of a module: its keys are regular expressions of how names end."""
    keys = [key for key in config[pattern] if re.match(rf"(.*\.)?({key})$", name)]
    return config[pattern][keys[0]] if keys else config[usual]


def applied(arrays, path):
    """A state dict with the adapter of a folder put onto it: ``W + lora_alpha / r * B @ A``, and modules to save."""
    config = json.loads((path / "adapter_config.json").read_text())
    found = {name.removeprefix(PREFIX): x for name, x in load_file(path / "adapter_model.safetensors").items()}
    out = {name: np.float64(x) for name, x in arrays.items()}
    for name in [name for name in found if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        assert any(f".{module}".endswith(f".{target}") for target in config["target_modules"])
        a, b = (np.float64(found.pop(f"{module}.lora_{x}.weight")) for x in "AB")
        assert len(a) == b.shape[1] == of_module(config, module, "r", "rank_pattern")
        root = len(a) ** 0.5 if config["use_rslora"] else len(a)
        out[f"{module}.weight"] += of_module(config, module, "lora_alpha", "alpha_pattern") / root * b @ a
    for name, x in found.items():
        assert name in out
        assert name.rpartition(".")[0] in (config["modules_to_save"] or ())
        out[name] = np.float64(x)
    return out


def random_adapter(params, targets, full=("^head/",), rank=3, scale=1.5, seed=0):
    """Every entry random."""
    rng = np.random.default_rng(seed)
    adapter = lora.new(jax.random.key(0), params, rank, targets=targets, full=full, scale=scale)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3, adapter)


def federated(backbone, adapter, side, classes):
    """The server's adapter after two rounds of FedIT."""
    x, y = (
        jax.random.randint(jax.random.key(0), (32, side, side, 3), 0, 256).astype(jnp.uint8),
        jnp.arange(32) % classes,
    )

    def loss_fn(base, adapter, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(
            backbone.apply(base, adapter, batch[0])[0], batch[1]
        ).mean()

    clients = Population(jnp.arange(32).reshape(2, 16), jnp.full(2, 16), jnp.full(2, lora.max_rank(adapter)))
    step = make_step(make_round(fl.fedit(), loss_fn, optax.sgd(0.1)), participants=2, steps=2, batch=4, smallest=16)
    run = rounds.start(fl.fedit(), jax.random.key(1), adapter, clients=2)
    run, _ = jax.jit(scan_rounds(step, 2))(backbone.params, (x, y), clients, run, jax.random.key(2))
    return run.state.adapter
