"""A function of the user's own, from ``FILE.py:FUNCTION``.

A file is read once in a process: what runs is what its hash says (of this file alone, not of what it imports).
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class File(NamedTuple):
    """A file as it was when it was read."""

    module: ModuleType
    digest: str  # of its content


def is_own(text: str) -> bool:
    """Is this ``FILE.py:FUNCTION``, and not the name of something that is built in?"""
    return text.partition(":")[0].endswith(".py")


def load(text: str, what: str) -> tuple[Any, str]:
    """The function, and a hash of its file.

    Args:
      text: ``FILE.py:FUNCTION``.
      what: it should make, for messages.

    Raises:
      ValueError: there is no such file or function, or the file cannot be imported; with the line that failed.
    """
    path, _, name = text.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"no file {path!r} for {what} {text!r}")
    module, digest = read(path)
    function = getattr(module, name, None)
    if not callable(function):
        own = [k for k, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__ and callable(x)]
        has = ", ".join(k for k in own if not k.startswith("_")) or "no functions"
        missing = f"has no function {name!r} for {what}" if name else f"needs a name, {path}:FUNCTION, for {what}"
        raise ValueError(f"{path} {missing}: it has {has}")
    return function, digest


@functools.cache
def read(path: str) -> File:
    """A file of functions.

    Raises:
      ValueError: it cannot be read or imported.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()[:16]
    module = ModuleType(f"user_code_{digest}_{Path(path).stem}")
    module.__file__ = str(Path(path).absolute())
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(Path(path).absolute().parent))  # as for a script: what lies beside it can be imported
    try:
        exec(compile(content, module.__file__, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise ValueError(f"{path}{_line(error, module.__file__)} cannot be imported: {_in_words(error)}") from error
    finally:
        sys.path.pop(0)
    return File(module, digest)


def call(
    text: str, function: Callable[..., Any], known: Mapping[str, Any], options: Mapping[str, Any] = NOTHING
) -> Any:
    """What a user's function makes, given what it asks for by name; whatever goes wrong there said in one line.

    Args:
      text: ``FILE.py:FUNCTION``.
      function: of that file.
      known: what it may ask for.
      options: what it is given besides.

    Raises:
      ValueError: it asks for something else, or it fails.
    """
    parameters = inspect.signature(function).parameters
    named = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    given = {**{k: x for k, x in known.items() if k in named}, **options}
    if unknown := [k for k, p in named.items() if p.default is p.empty and k not in given]:
        raise ValueError(f"nothing gives it {unknown[0]}: a default would, and there are {', '.join(sorted(known))}")
    try:
        return function(**given)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(failed(error, text.partition(":")[0])) from error


def failed(error: Exception, path: str) -> str:
    """What went wrong in a function of a file, and in which line of it."""
    return f"{path}{_line(error, str(read(path).module.__file__))}: {_in_words(error)}"


def _line(error: BaseException, file: str) -> str:
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def _in_words(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
