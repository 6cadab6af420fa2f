"""Make the built-in weights: a nano ViT and a nano MLP-Mixer that can read printed digits and have seen no handwriting.

``python -m experiments.setup.pretrain [--model NAME] [--out FOLDER]`` takes about four minutes for each on two CPU
cores, and writes ``nano_glyphs.npz`` (ViT) and ``nano_mixer.npz``; ``pretrain_clip`` makes the CLIP. The fonts are
those that matplotlib ships (DejaVu: Bitstream Vera licence; STIX: STIX Font Licence; cm*: BaKoMa Fonts Licence); every
training image is drawn inside the jitted program from a glyph's signed distance field, in which stroke weight is an
offset. Letters are learnt along with the digits, half of the images, and their outputs dropped in the end: features
tune better so.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import optax.contrib
from jax import Array
from jax.scipy.ndimage import map_coordinates
from matplotlib.ft2font import FT2Font
from scipy import ndimage
from tqdm import tqdm

from experiments.setup.backbone import BUILT_IN
from experiments.setup.digits import SIDE, digits
from models import tables
from models.mixer import mixer
from models.pretrained import to_timm
from models.pretrained_mixer import TIMM
from models.vit import normalise, vit

PATCH = 4
HELD_OUT = ("DejaVuSerif-BoldItalic", "STIXGeneralBol", "cmss10")
# Fonts of matplotlib without digits, or (cmex, cmsy, LastResort) with other signs in their places.
NO_DIGITS = ("cmex", "cmsy", "LastResort", "STIXNonUni", "STIXSiz", "DejaVuSansDisplay", "DejaVuSerifDisplay")

# Letters that differ from one another and from digits even when all are drawn at one height, none very wide.
LETTERS = "ABCDEFGHJKLNPRSTUXYZ" + "abdefghnqrty"
DIGITS = "0123456789"
CHARACTERS = DIGITS + LETTERS

GRID = 48  # side of a glyph's distance field
BOX = 36  # height of the glyph in it
MEAN = STD = np.full(3, 0.5, np.float32)
STEPS, BATCH, PEAK, DECAY = 6000, 64, 1e-2, 0.1
SCAN = 200  # steps in one call of the compiled program


class Nano(NamedTuple):
    """A model that is made small and in here.

    Attributes:
      make: ``(classes) -> module`` of flax.
      names: ``(params) -> arrays`` under timm's names.
    """

    make: Callable[[int], Any]
    names: Callable[[dict[str, Any]], dict[str, Any]]


MODELS = {
    "vit": Nano(lambda classes: vit(f"nano/{PATCH}", classes), to_timm),
    "mixer": Nano(
        lambda classes: mixer(f"nano/{PATCH}", classes), lambda params: tables.write_params(TIMM, params, PATCH)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.setup.pretrain", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", choices=MODELS, help="which (default: all)")
    parser.add_argument(
        "--out", type=Path, default=BUILT_IN["vit"].parent, help="folder to write (default: %(default)s)"
    )
    options = parser.parse_args()
    train, held_out = fields()
    for name in [options.model] if options.model else MODELS:
        params, path = pretrain(MODELS[name], train), options.out / BUILT_IN[name].name
        save(path, MODELS[name], params)
        print(f"wrote {path} ({path.stat().st_size / 2**20:.2f} MB)")
        report(MODELS[name].make(len(DIGITS)), params, held_out)


def fields() -> tuple[np.ndarray, np.ndarray]:
    """Signed distance fields ``[fonts, characters, 48, 48]``: all characters for training, digits of held-out fonts."""
    paths = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    fonts = {path.stem: path for path in paths if not path.stem.startswith(NO_DIGITS)}
    stack = lambda names, signs: np.stack([[_field(fonts[name], sign) for sign in signs] for name in names])
    return stack([name for name in fonts if name not in HELD_OUT], CHARACTERS), stack(HELD_OUT, DIGITS)


def _field(path: Path, character: str) -> np.ndarray:
    """Distance to the glyph's edge in units of its height, positive inside; centred, 3/4 of the field high."""
    font = FT2Font(str(path))
    font.set_size(200, 72)
    font.set_text(character)
    font.draw_glyphs_to_bitmap(antialiased=False)
    bitmap = np.asarray(font.get_image()) > 0
    rows, columns = (np.flatnonzero(bitmap.any(axis)) for axis in (1, 0))
    bitmap = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = bitmap.shape
    side = round(height * GRID / BOX)
    top, left = (side - height) // 2, (side - width) // 2
    canvas = np.pad(bitmap, ((top, side - height - top), (left, side - width - left)))
    inside, outside = (np.asarray(ndimage.distance_transform_edt(part)) for part in (canvas, ~canvas))
    cells = (np.arange(GRID) + 0.5) * side / GRID - 0.5
    return ndimage.map_coordinates(
        (inside - outside) / height, np.meshgrid(cells, cells, indexing="ij"), order=1, mode="nearest"
    )


def draw(key: Array, field: Array) -> Array:
    """One random image ``[16, 16, 3]`` in 0..1 of a glyph: pose, bending, weight, colours, shading, noise."""
    keys = iter(jax.random.split(key, 16))
    uniform = lambda low, high, shape=(): jax.random.uniform(next(keys), shape, minval=low, maxval=high)
    # where in the glyph each pixel looks: an affine map, bent by a smooth displacement
    turn, shear = uniform(-0.3, 0.3), uniform(-0.3, 0.3)
    size = uniform(11.0, 15.5) * jnp.stack([uniform(0.9, 1.1), uniform(0.8, 1.4)])
    pixel = (jnp.mgrid[:SIDE, :SIDE].reshape(2, -1) - (SIDE - 1) / 2 + uniform(-1.0, 1.0, (2, 1))) / size[:, None]
    rotation = jnp.array([[jnp.cos(turn), -jnp.sin(turn)], [jnp.sin(turn), jnp.cos(turn)]])
    bend = jax.image.resize(uniform(-0.14, 0.14, (2, 4, 4)), (2, SIDE, SIDE), "cubic").reshape(2, -1)
    place = jnp.array([[1.0, 0.0], [shear, 1.0]]) @ rotation @ pixel + bend
    distance = map_coordinates(field, list(BOX * place + (GRID - 1) / 2), order=1, mode="nearest")
    cover = jax.nn.sigmoid((distance + uniform(-0.01, 0.06)) / uniform(0.015, 0.05)).reshape(SIDE, SIDE, 1)
    # two colours that differ enough in some channel, uneven light, noise
    ground, ink = uniform(0.0, 1.0, (3,)), uniform(0.0, 1.0, (3,))
    ink = jnp.where(jnp.abs(ink - ground).max() < 0.35, (ground + 0.5) % 1.0, ink)
    image = ground + cover * (ink - ground)
    shade = jax.image.resize(uniform(-0.1, 0.1, (3, 3, 1)), (SIDE, SIDE, 1), "cubic")
    return jnp.clip(image + shade + uniform(0.0, 0.08) * jax.random.normal(next(keys), image.shape), 0, 1)


def batch(key: Array, glyphs: Array, size: int) -> tuple[Array, Array]:
    """Random images as the model sees them, normalised, with their labels; at least half of them are digits."""
    font_key, label_key, digit_key, draw_key = jax.random.split(key, 4)
    fonts, characters = glyphs.shape[:2]
    font = jax.random.randint(font_key, (size,), 0, fonts)
    label = jax.random.randint(label_key, (size,), 0, characters)
    label = jnp.where(jax.random.bernoulli(digit_key, 0.5, (size,)), label % 10, label)
    images = jax.vmap(draw)(jax.random.split(draw_key, size), glyphs[font, label])
    return normalise(255 * images, MEAN, STD), label


def pretrain(nano: Nano, glyphs: np.ndarray, steps: int = STEPS) -> dict[str, Any]:
    """The parameters of a nano model, all of it trained with a warm-up and a cosine; ``steps`` a multiple of ``SCAN``.

    Matrices inside the blocks learn by Muon, everything else by Adam: a third of the steps that Adam alone would take.
    """
    model = nano.make(len(CHARACTERS))
    init_key, data_key = jax.random.split(jax.random.key(0))
    params: dict[str, Any] = dict(model.init(init_key, jnp.zeros((1, SIDE, SIDE, 3)))["params"])
    if "pos" in params:
        params["pos"] = params["pos"].at[1:].set(positions(*params["pos"][1:].shape))
    fields = jnp.asarray(glyphs, jnp.float32)

    def loss_fn(params, key):
        x, y = batch(key, fields, BATCH)
        return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x)[0], y).mean()

    params = descended(params, loss_fn, data_key, steps)
    return {**params, "head": {name: value[..., :10] for name, value in params["head"].items()}}


def descended(params: Any, loss_fn: Callable[[Any, Array], Array], data_key: Array, steps: int) -> Any:
    """Parameters after so many steps down ``loss_fn(params, key)``, each with a key of its own."""
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 20, steps)
    optimizer = optax.contrib.muon(
        rate,
        adam_learning_rate=lambda step: 0.2 * rate(step),
        weight_decay=DECAY,
        muon_weight_dimension_numbers=_block_matrices,
    )

    def step(carry, i):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(data_key, i))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    scan = jax.jit(lambda carry, first: jax.lax.scan(step, carry, first + jnp.arange(SCAN)))
    carry = params, optimizer.init(params)
    with tqdm(total=steps, unit="step") as bar:
        for first in range(0, steps, SCAN):
            carry, losses = scan(carry, first)
            bar.set_postfix(loss=f"{losses.mean():.3f}")
            bar.update(SCAN)
    return carry[0]


def _block_matrices(params: Any) -> Any:
    """Which axes Muon takes for a matrix: the last two of every kernel in a block (the first one stacks the blocks)."""
    matrix = optax.contrib.MuonDimensionNumbers(-2, -1)
    in_blocks = lambda names: "blocks" in names and names[-1] == "kernel"
    choose = lambda path, _: matrix if in_blocks([entry.key for entry in path]) else None
    return jax.tree_util.tree_map_with_path(choose, params)


def positions(tokens: int, width: int) -> Array:
    """Sines and cosines of row and column, ``[tokens, width]``: a start from which learning is about twice as fast."""
    place = jnp.mgrid[: round(tokens**0.5), : round(tokens**0.5)].reshape(2, -1, 1)
    angle = 2 * place / 100.0 ** (jnp.arange(width // 4) / (width // 4))
    return 0.5 * jnp.concatenate([*jnp.sin(angle), *jnp.cos(angle)], -1)


def save(path: Path, nano: Nano, params: dict[str, Any]) -> None:
    """Write the weights and where they come from; the file is there whole or not at all."""
    model = nano.make(len(DIGITS))
    meta = {
        "source": "glyphs (digits, letters) of the fonts bundled with matplotlib; no handwriting",
        "licence": "Apache-2.0",
        "command": "python -m experiments.setup.pretrain",
        "patch": PATCH,
        "img": SIDE,
        **({"heads": model.heads} if hasattr(model, "heads") else {}),
        "ln_eps": model.epsilon,
        "mean": MEAN.tolist(),
        "std": STD.tolist(),
        "classes": list(DIGITS),
        "naming": "timm",
    }
    named = nano.names(params)
    write(path, lambda file: np.savez_compressed(file, meta=json.dumps(meta), **named))  # type: ignore[arg-type]


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """A file, there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def report(model: Any, params: dict[str, Any], held_out: np.ndarray) -> None:
    """Print accuracy on fonts left out of training and, without any tuning, on the digits' training split."""
    right = jax.jit(lambda x, y: model.apply({"params": params}, x)[0].argmax(-1) == y)
    x, y = jax.jit(lambda key: batch(key, jnp.asarray(held_out, jnp.float32), 2000))(jax.random.key(1))
    print(f"held-out fonts ({', '.join(HELD_OUT)}): {100 * right(x, y).mean():.1f} %")
    data = digits()
    hits = np.asarray(right(normalise(data["x"], MEAN, STD), data["y"]))
    for d, name in enumerate(data["domains"]):
        print(f"{name:>10}: {100 * hits[(data['domain'] == d) & (data['split'] == 0)].mean():.1f} %")
    print(f"zero-shot on the digits' training split: {100 * hits[data['split'] == 0].mean():.1f} %")


if __name__ == "__main__":
    main()
