"""Position embeddings for images of another size than a model was trained at, as the libraries resize them.

All interpolate by cubic convolution (Keys, 1981), each coordinate at the centre of its patch. Where nothing is filtered
(transformers) the parameter is PyTorch's, a = -3/4; with a filter that is widened where there are fewer patches than
before (timm, OpenCLIP, DINOv2 with registers) it is a = -1/2, and JAX does the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def resized(
    positions: np.ndarray, image_size: int | None, patch: int, first: int = 1, antialias: bool = True
) -> np.ndarray:
    """Position embeddings for images of that side (``None``: as they are), as ``resize_positions``.

    Raises:
      ValueError: images of that side cannot be cut into patches.
    """
    if image_size is not None and image_size % patch:
        raise ValueError(
            f"images of side {image_size} cannot be cut into patches of {patch}: use a multiple of {patch}"
        )
    return resize_positions(positions, None if image_size is None else image_size // patch, first, antialias)


def resize_positions(positions: np.ndarray, grid: int | None, first: int = 1, antialias: bool = True) -> np.ndarray:
    """Position embeddings ``[first + g * g, width]`` (class token first) for a ``grid x grid`` of patches, bicubic."""
    own, patches = positions[:first], positions[first:]
    old = round(len(patches) ** 0.5)
    if old * old != len(patches):
        raise ValueError(f"{len(positions)} position embeddings are not a class token and a square grid")
    if grid is None or grid == old:
        return positions
    square = patches.reshape(old, old, -1)
    if antialias:
        out = np.asarray(jax.image.resize(jnp.asarray(square, jnp.float32), (grid, grid, square.shape[-1]), "bicubic"))
    else:
        w = cubic(old, grid)
        out = np.einsum("ia,jb,abc->ijc", w, w, square).astype(np.float32)
    return np.concatenate([own, out.reshape(grid * grid, -1)])


def cubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """Weights ``[new, old]`` by which ``new`` values are interpolated; beyond the ends, the last ones are repeated.

    The kernel at distance ``d`` (Keys, *Cubic Convolution Interpolation for Digital Image Processing*, 1981, eq. 15):

        (a + 2) d^3 - (a + 3) d^2 + 1       d <= 1
        a d^3 - 5 a d^2 + 8 a d - 4 a       1 < d < 2
    """
    at = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        place = np.floor(at) + tap
        d = np.abs(at - place)
        near, far = ((a + 2) * d - (a + 3)) * d**2 + 1, a * (((d - 5) * d + 8) * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(place, 0, old - 1).astype(int)), np.where(d <= 1, near, far))
    return weights
