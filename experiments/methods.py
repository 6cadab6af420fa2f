"""Methods by their file names in ``fedlora_jax/methods``: a new file there is a new method here."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import fedlora_jax.methods
from fedlora_jax.method import About, Method


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(fedlora_jax.methods.__path__))


def check(spec: str) -> None:
    """Refuse a name or an option that does not exist."""
    _parse(spec)


def about(spec: str) -> About:
    """Of ``NAME`` or ``NAME:OPTION=VALUE:...``; options are part of the name shown (words without their key)."""
    name, *options = spec.split(":")
    entry = _module(name).ABOUT
    short = [text.partition("=")[2] if text.partition("=")[2].isidentifier() else text for text in options]
    return entry._replace(name=f"{entry.name} ({', '.join(short)})") if options else entry


def build(spec: str, **facts: Any) -> Method:
    """The method, given those facts of the run that it asks for by name, and its options.

    Args:
      spec: ``NAME`` or ``NAME:OPTION=VALUE:...``, such as ``lora_fair:lam=0.1:solver=ridge``.
      **facts: what is known of the run, such as ``participants``.
    """
    make, chosen = _parse(spec)
    return make(**{key: facts[key] for key in inspect.signature(make).parameters if key in facts}, **chosen)


def _parse(spec: str) -> tuple[Callable[..., Method], dict[str, Any]]:
    """The function that makes the method, and the options that are set."""
    name, *options = spec.split(":")
    make = getattr(_module(name), name)
    settable = {key: p for key, p in inspect.signature(make).parameters.items() if _is_plain(p.default)}
    return make, dict(_option(spec, text, settable) for text in options)


def _option(spec: str, text: str, settable: dict[str, inspect.Parameter]) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if key not in settable or not equals:
        can = ", ".join(f"{k}={p.default}" for k, p in settable.items()) or "none"
        raise ValueError(f"{spec!r}: {text!r} is no option of {spec.split(':')[0]}; it has {can}")
    kind = type(settable[key].default)
    try:
        return key, {"True": True, "False": False}[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise ValueError(f"{spec!r}: {key} must be {kind.__name__}, got {value!r}") from None


def _is_plain(default: Any) -> bool:
    return isinstance(default, (bool, int, float, str))


def _module(name: str) -> Any:
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
        raise ValueError(f"unknown method {name!r}: did you mean {near[0]}? There are {', '.join(names())}")
    return importlib.import_module(f"fedlora_jax.methods.{name}")
