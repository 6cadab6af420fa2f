"""Published weights of MLP-Mixers to the parameters of ``models.mixer``: timm's names, and the original ``.npz``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.lora import Params

from . import facts, files, original, tables, timm
from .backbone import Backbone, Layout, Published
from .mixer import TARGETS, Mixer
from .pretrained import Pretrained, backbone, start_of_head
from .tables import Table

_LAYERS = ("norm1", "mlp_tokens/fc1", "mlp_tokens/fc2", "norm2", "mlp_channels/fc1", "mlp_channels/fc2")
TIMM = Table(
    "timm",
    {"embed": "stem.proj", "norm": "norm", "head": "head"},
    {layer: f"blocks.{{i}}.{layer.replace('/', '.')}" for layer in _LAYERS},
    torch=True,
)
_ORIGINAL = ("LayerNorm_0", "token_mixing/Dense_0", "token_mixing/Dense_1")
_ORIGINAL += ("LayerNorm_1", "channel_mixing/Dense_0", "channel_mixing/Dense_1")
ORIGINAL = Table(
    "the original (big_vision)",
    {"embed": "stem", "norm": "pre_head_layer_norm", "head": "head"},
    dict(zip(_LAYERS, (f"MixerBlock_{{i}}/{name}" for name in _ORIGINAL), strict=True)),
    torch=False,
)
ALIKE = {("pool", "global_pool"): ("avg", "mean", "")}


def claims(names: Iterable[str]) -> bool:
    """Are these names of a Mixer?"""
    return any(name.startswith(("stem.proj.", "MixerBlock_")) or ".mlp_tokens." in name for name in names)


def load_mixer(
    path: str | Path,
    classes: int | Sequence[str] | None = None,
    image_size: int | None = None,
    *,
    epsilon: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_head: bool = False,
    **options: Any,
) -> Pretrained:
    """Load an MLP-Mixer from a ``.npz`` or ``.safetensors`` file; each array is used, or refused by name.

    Args:
      path, classes, epsilon, mean, std, keep_head: as for ``models.pretrained.load_vit``.
      image_size: side of the images to come, which must be that of the weights: token MLPs have as many inputs as
        there are patches.
      **options: of ``Mixer`` (``unroll``, ``dtype``).

    Raises:
      ValueError: the file is missing, damaged, or does not hold such a model; a value is of a wrong kind; there is no
        head to keep; the images have another size.
    """
    source, path = Path(path), files.located(path)
    table = tables.fitted(_table(path), files.names_in(path))
    wanted = lambda found: tables.check_names(path, table, found, "an MLP-Mixer")
    arrays, inside = files.read(path, wanted, lambda arrays: _check_shapes(path, table, arrays))
    params = tables.read_params(table, arrays)
    model, side = _model(table, arrays)
    if image_size is not None and image_size != side:
        raise ValueError(f"{path} mixes patches of images of side {side}: use --image-size {side}, got {image_size}")
    channels = params["embed"]["kernel"].shape[0] // model.patch**2
    given = {"epsilon": epsilon, "mean": mean, "std": std}
    # the original computes flax' nn.gelu, which is the approximation by tanh
    implied = {"act": "gelu" if table.torch else original.COMPUTED["act"]}
    known = facts.find(path, inside, given, model.width, channels, ALIKE, ("heads", "pool"), implied)
    head, kept = start_of_head(path, params.pop("head", None), model.width, known.labels, classes, keep_head)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), {**params, "head": head})
    model = model.clone(classes=len(head["bias"]), epsilon=known.epsilon, act=known.act, **options)
    origins = {**known.origins, "head": kept}
    layouts = _layouts(table, model.depth)
    return Pretrained(model, params, known.mean, known.std, files.name_of(source), origins, layouts=layouts)


def mixer_backbone(
    weights: str | Path,
    classes: int | Sequence[str] | None = None,
    image_size: int | None = None,
    epsilon: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_head: bool = False,
    dtype: str = "float32",
) -> Backbone:
    """The ``Backbone`` of a file; arguments and errors as for ``load_mixer``."""
    given = {"epsilon": epsilon, "mean": mean, "std": std, "keep_head": keep_head, "dtype": getattr(jnp, dtype)}
    mixer, table = load_mixer(weights, classes, image_size, **given), _table(files.located(Path(weights)))

    def names(params: Params) -> dict[str, np.ndarray]:
        arrays = tables.write_params(table, params, mixer.model.patch)
        return {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}

    return backbone(mixer, TARGETS, lambda params: Published(names(params), mixer.said()))


def _layouts(table: Table, depth: int) -> dict[str, Layout]:
    return {"timm": Layout(tables.linears(table, depth), timm.BASE)} if table.torch else {}


def _table(path: Path) -> Table:
    return ORIGINAL if any(name.startswith("MixerBlock_") for name in files.names_in(path)) else TIMM


def _model(table: Table, arrays: dict[str, np.ndarray]) -> tuple[Mixer, int]:
    """The network that a few of its arrays tell the size of, and the side of its images."""
    size = lambda layer, kind="bias": arrays[table.theirs(layer, kind, None if layer in table.top else 0)].size
    conv = arrays[table.theirs("embed", "kernel")]
    patch = conv.shape[-1] if table.torch else conv.shape[0]
    tokens, head = size("mlp_tokens/fc2"), table.theirs("head", "bias")
    classes = arrays[head].size if head in arrays else 1
    model = Mixer(
        classes,
        patch,
        size("embed"),
        table.depth(arrays),
        size("mlp_tokens/fc1"),
        size("mlp_channels/fc1"),
    )
    return model, math.isqrt(tokens) * patch


def _check_shapes(path: Path, table: Table, arrays: dict[str, np.ndarray]) -> None:
    conv = arrays[table.theirs("embed", "kernel")]
    if conv.ndim != 4 or not all(x.size for x in arrays.values()):
        raise ValueError(f"{path} is not an MLP-Mixer: its patches are embedded by an array {list(conv.shape)}")
    model, side = _model(table, arrays)
    channels = conv.shape[1] if table.torch else conv.shape[2]

    def whole() -> dict[str, Any]:
        params = model.init(jax.random.key(0), jnp.zeros((1, side, side, channels)))["params"]
        return tables.write_params(table, params, model.patch)

    tables.check_shapes(path, arrays, jax.eval_shape(whole), f"an MLP-Mixer of width {model.width}")
