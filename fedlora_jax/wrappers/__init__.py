"""Wrappers ``Method -> Method``: one small file each, with an ``ABOUT`` of every wrapper in it by function name.

What one adds is a ``Wrapper`` (``around``), a NamedTuple of functions as a method is; ``refusals`` and ``updates`` are
for all of them.

They stack and stay one traced round. The outermost sees first what clients send, and last what the server has made of
it: ``krum(clip(m))`` chooses first. An order, or a pair, that has no meaning is refused when it is made, with
what to do instead: ``dp(clip(m))`` would clip noise away. ``order`` has the table of all pairs.

All of them live in *factor* space, on what clients share (``Method.upload_mask``). Methods that take singular vectors
for factors (FlexLoRA) may turn these from round to round, and momenta or control variates kept over rounds then point
nowhere: there, use ``flexlora(split="balanced", gauge=True)``. A method that keeps part of what it learned in a dense
residual, or has no global ``adapter`` at all, is refused by wrappers that keep something in its coordinates.
"""

from fedlora_jax.wrappers.around import AboutWrapper, Wrapped, innermost

__all__ = ["AboutWrapper", "Wrapped", "innermost"]
