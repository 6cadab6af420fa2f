"""A gradient that is meant to be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


def forward_over_reverse(f: Callable[[Any], tuple[Array, Any]]) -> Callable[[Any], tuple[Any, Any]]:
    """``jax.grad(f, has_aux=True)`` whose own backward pass is a forward derivative of the gradient.

    Hessians are symmetric: ``sum_i v_i d(grad_x f)_i / dz = d/dh grad_z f(x + h v)``, for ``z`` of ``x`` and of what
    ``f`` closes over. Reverse over reverse keeps all that the first backward pass took for the second; this keeps ``x``
    and computes the gradient again beside its derivative. It cannot be differentiated in forward mode.

    Args:
      f: ``x -> (scalar, aux)``, floats.
    """

    def gradient(x: Any) -> tuple[Any, Any]:
        traced, shape = jax.make_jaxpr(f, return_shape=True)(x)  # what f closes over becomes an argument

        def pure(x: Any, closed: list[Any]) -> tuple[Array, Any]:
            out = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, closed))(*jax.tree.leaves(x))
            return jax.tree.unflatten(jax.tree.structure(shape), out)

        @jax.custom_vjp
        def grad(x: Any, closed: list[Any]) -> tuple[Any, Any]:
            return jax.grad(pure, has_aux=True)(x, closed)

        def forward(x: Any, closed: list[Any]):
            x, values = (jax.tree.map(lambda p: p.value, tree, is_leaf=_is_primal) for tree in (x, closed))
            moving = [p.value if p.perturbed else None for p in closed]
            return grad(x, values), (x, values, moving)

        def backward(kept, cotangents):
            x, values, moving = kept
            v, c = jax.tree.map(_array, cotangents, is_leaf=_is_zero)

            def pull(x: Any, c: Any) -> Any:
                put = lambda moving: [m if m is not None else y for m, y in zip(moving, values, strict=True)]
                out, back = jax.vjp(lambda x, moving: pure(x, put(moving)), x, moving)
                return back((jnp.ones_like(out[0]), c))

            # f is pulled back from 1, aux from 0 in the direction of its cotangent: that adds aux's own gradient.
            return jax.jvp(pull, (x, jax.tree.map(jnp.zeros_like, c)), (v, c))[1]

        grad.defvjp(forward, backward, symbolic_zeros=True)
        return grad(x, traced.consts)

    return gradient


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _is_zero(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _array(x: Any) -> Any:
    return jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x
