"""Products of a layer in the order, and with the types, in which a CPU computes them fast; numbers are the usual ones.

Accelerators do by themselves what is written out here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def matmul(x: Array, y: Array) -> Array:
    """``x y`` for ``x [..., n, in]`` and ``y [in, out]`` of one dtype, which is the result's.

    Of 16 bits it is summed in float32 and rounded once. A CPU with units for such products (AMX) uses them only where
    XLA is asked for a result in float32, and then for both derivatives too.
    """
    return _half(x, y) if x.dtype.itemsize == 2 else x @ y


def _summed(x: Array, y: Array) -> Array:
    """``matmul``, with the derivatives that JAX finds: fast once."""
    if x.dtype.itemsize != 2:
        return x @ y
    wide = lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)
    return jax.lax.platform_dependent(x, y, cpu=wide, default=jnp.matmul)


def _half_vjp(residuals, ct: Array) -> tuple[Array, Array]:
    x, y = residuals
    rows, d_rows = x.reshape(-1, x.shape[-1]), ct.reshape(-1, ct.shape[-1])
    return _summed(ct, y.T), _summed(written_out(rows.T), d_rows)


_half = jax.custom_vjp(_summed)
_half.defvjp(lambda x, y: (_summed(x, y), (x, y)), _half_vjp)


@jax.custom_vjp
def low_rank(x: Array, a: Array, b: Array) -> Array:
    """``(x a) b`` for ``x [..., in]``, ``a [in, rank]`` and ``b [rank, out]``.

    Its derivative in ``a`` and ``b`` is two products of few long rows with a tall matrix, which is the one order in
    which a CPU computes such products fast.
    """
    return _summed(_summed(x, a), b)


def _low_rank_vjp(residuals, ct: Array) -> tuple[Array, Array, Array]:
    x, a, b = residuals
    rows, d_rows = x.reshape(-1, x.shape[-1]), ct.reshape(-1, ct.shape[-1])
    u, v = written_out((_summed(b, d_rows.T), _summed(a.T, rows.T)))  # [rank, n]
    return _summed(_summed(ct, b.T), a.T), written_out(_summed(u, rows)).T, _summed(v, d_rows)


low_rank.defvjp(lambda x, a, b: (_summed(_summed(x, a), b), (x, a, b)), _low_rank_vjp)


def written_out(x: Any) -> Any:
    """The arrays as they are, and on a CPU stored in the order of their axes before they are used.

    XLA folds a transpose into the product that follows, and multiplies matrices stored the other way round slowly.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
