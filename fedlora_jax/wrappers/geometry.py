"""How far clients' updates lie apart, in the space of factors or in that of products.

Factors are two of many that have one product: ``(a t) (b / t)`` is ``a b``, however far apart these are. Distances of
products are those of what a model computes with. They come from inner products ``<D_c, D_d>`` of the low-rank
``D_c = a_c b_c - a_g b_g``, of r x r matrices each; nothing of ``in x out`` is formed. What is trained in full is
entries in both spaces.

Where clients hold different entries (of factors) or layers (of products), two are compared on what both hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import product
from fedlora_jax.lora import Adapter, LoRA, is_lora
from fedlora_jax.method import Dispatch, Method, all_of_it, per_client
from fedlora_jax.wrappers.updates import change


class Entries(NamedTuple):
    """One array of all clients' updates."""

    values: Array  # [C, ...], 0 where a client does not hold an entry
    held: Array  # [C, ...] 1 where it does, broadcastable

    def apart(self) -> Array:
        """``[C, C]`` squared distances over what both hold; as differences, which do not cancel."""
        one = lambda y, n: jax.vmap(lambda z, k: jnp.sum(n * k * (y - z) ** 2))(self.values, self.held)
        return jax.vmap(one)(self.values, self.held)

    def common(self) -> Array:
        """``[C, C]`` how many entries both hold."""
        m = self.held.astype(self.values.dtype)
        return jnp.einsum("c...,d...->cd", m, m) * (self.values.size / m.size)

    def from_mean(self, weights: Array) -> Array:
        """``[C]`` squared distances from the mean of the holders of each entry by ``weights [C]``."""
        p = self.held * per_client(weights, self.values)
        mean = (p * self.values).sum(0) / jnp.maximum(p.sum(0), 1e-12)
        return jnp.sum(self.held * (self.values - mean) ** 2, tuple(range(1, self.values.ndim)))


class Products(NamedTuple):
    """The products of one kernel's updates, of all clients: what ``Entries`` has, layer for entry."""

    inner: Array  # [C, C, L] inner products
    held: Array  # [C, L] 1 where a client may move a layer
    size: int  # entries of one

    def apart(self) -> Array:
        """``[C, C]`` squared distances over what both hold."""
        own = jnp.diagonal(self.inner).T  # [C, L]
        square = jnp.maximum(own[:, None] + own[None] - 2 * self.inner, 0.0)
        return jnp.einsum("cdl,cl,dl->cd", square, self.held, self.held)

    def common(self) -> Array:
        """``[C, C]`` how many entries of products both hold."""
        return self.size * self.held @ self.held.T

    def from_mean(self, weights: Array) -> Array:
        """``[C]`` squared distances from the mean of the holders of each layer by ``weights [C]``."""
        p = self.held * weights[:, None]
        p /= jnp.maximum(p.sum(0), 1e-12)
        near = jnp.einsum("cdl,dl->cl", self.inner, p)
        square = jnp.diagonal(self.inner).T - 2 * near + jnp.einsum("cl,cl->l", near, p)
        return (self.held * jnp.maximum(square, 0.0)).sum(1)


def refuse_space(wrapper: str, on: str, inner: Method) -> None:
    """Refuse a space that is none, or products of which clients send a part alone.

    Raises:
      ValueError: says which.
    """
    if on not in ("factors", "products"):
        raise ValueError(f"{wrapper} compares on='factors' or on='products', got {on!r}")
    if on == "products" and inner.upload_mask is not all_of_it:
        raise ValueError(
            f"{wrapper} on products needs both factors, and clients of this method keep a part of what they train: "
            "take on='factors', or wrap a method whose clients send all of it, such as fedit"
        )


def parts(on: str, sent: Dispatch, received: Adapter) -> list[Entries | Products]:
    """All clients' updates of what they share: array by array, or of ``products`` kernel by kernel."""
    if on == "factors":
        d = change(sent.mask, sent.adapter, received)
        return [Entries(*both) for both in zip(*map(jax.tree.leaves, (d, sent.mask)), strict=True)]
    return [_products(*own) if is_lora(own[0]) else _entries(*own) for own in _leaves(sent, received)]


def total(found: list[Array]) -> Array:
    """Their sum; 0 of none."""
    return sum(found, jnp.zeros(()))


def _leaves(sent: Dispatch, received: Adapter) -> list[tuple[Any, Any, Any]]:
    """What was sent, what came back and the mask, of each kernel and of each array that is trained in full."""
    leaves = (jax.tree.leaves(tree, is_leaf=is_lora) for tree in (sent.adapter, received, sent.mask))
    return list(zip(*leaves, strict=True))


def _entries(start: Array, end: Array, mask: Array) -> Entries:
    return Entries((end - start) * mask.astype(start.dtype), mask)


def _products(start: LoRA, end: LoRA, mask: LoRA) -> Products:
    da, db = (_entries(x, y, m).values for x, y, m in _factors(start, end, mask))
    d = LoRA(jnp.concatenate([da, start.a], -1), jnp.concatenate([start.b + db, db], -2), start.scale)
    inner = jax.lax.map(lambda x: jax.vmap(lambda y: product.inner(x, y))(d), d)  # [C, C, ...]
    clients, (n_in, n_out) = len(d.a), (d.a.shape[-2], d.b.shape[-1])
    held = (mask.a.any((-2, -1)) | mask.b.any((-2, -1))).astype(d.a.dtype)
    held = jnp.broadcast_to(held, d.a.shape[:-2]).reshape(clients, -1)
    return Products(inner.reshape(clients, clients, -1), held, n_in * n_out)


def _factors(start: LoRA, end: LoRA, mask: LoRA) -> list[tuple[Array, Array, Array]]:
    return [(start.a, end.a, mask.a), (start.b, end.b, mask.b)]


class Way(NamedTuple):
    """The squared norm ``s^2 two + s^3 three + s^4 four``, ``[C]`` each, of an update after a part ``s`` of its way.

    The way of factors from ``(a, b)`` by ``(s da, s db)`` moves a product by ``s (da b + a db) + s^2 da db``.
    """

    two: Array
    three: Array
    four: Array

    def norms(self) -> Array:
        """``[C]`` of the whole way."""
        return product.safe_sqrt(self._square(jnp.ones_like(self.two)))

    def within(self, bound: Array, halvings: int = 40) -> Array:
        """``[C]`` from 0 to 1: how far a client may go for a norm of at most ``bound``; 1 where all is short enough."""

        def halve(_, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) / 2
            short = self._square(middle) <= bound**2
            return jnp.where(short, middle, low), jnp.where(short, high, middle)

        ends = jnp.zeros_like(self.two), jnp.ones_like(self.two)
        return jnp.where(self.norms() <= bound, 1.0, jax.lax.fori_loop(0, halvings, halve, ends)[0])

    def _square(self, s: Array) -> Array:
        return s**2 * (self.two + s * (self.three + s * self.four))


def way(sent: Dispatch, received: Adapter) -> Way:
    """How clients' products move on the way of their factors, all kernels and arrays together."""
    ways = [_way(*own) if is_lora(own[0]) else _straight(_entries(*own).values) for own in _leaves(sent, received)]
    return Way(*(total([getattr(one, power) for one in ways]) for power in Way._fields))


def _way(start: LoRA, end: LoRA, mask: LoRA) -> Way:
    da, db = (_entries(x, y, m).values for x, y, m in _factors(start, end, mask))
    first = LoRA(jnp.concatenate([da, start.a], -1), jnp.concatenate([start.b, db], -2), start.scale)
    second = LoRA(da, db, start.scale)
    layers = lambda x: x.reshape(len(x), -1).sum(1)
    pairs = (first, first), (first, second), (second, second)
    two, three, four = (layers(product.inner(x, y)) for x, y in pairs)
    return Way(two, 2 * three, four)


def _straight(d: Array) -> Way:
    square = jnp.sum(d**2, tuple(range(1, d.ndim)))
    return Way(square, jnp.zeros_like(square), jnp.zeros_like(square))
