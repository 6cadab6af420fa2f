"""A function of the user's own, from ``FILE.py:FUNCTION``."""

from __future__ import annotations

import hashlib
import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def is_own(text: str) -> bool:
    """Is this ``FILE.py:FUNCTION``, and not the name of something that is built in?"""
    return ".py:" in text


def load(text: str, what: str) -> tuple[Callable[..., Any], str]:
    """The function, and a hash of its file.

    Args:
      text: ``FILE.py:FUNCTION``.
      what: it should make, for messages.

    Raises:
      ValueError: there is no such file or function, or the file cannot be imported; with the line that failed.
    """
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"no file {path!r} for {what} {text!r}")
    content = Path(path).read_bytes()
    spec = importlib.util.spec_from_file_location(f"user_code_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        line = getattr(error, "lineno", None) or (at[-1] if at else None)
        where = f"{path}, line {line}" if line else path
        raise ValueError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        has = ", ".join(k for k, x in vars(module).items() if callable(x) and not k.startswith("_")) or "no functions"
        raise ValueError(f"{path} has no function {name!r} for {what}: it has {has}")
    return function, hashlib.sha256(content).hexdigest()[:16]
