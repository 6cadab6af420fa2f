"""Methods by their file names in ``fedlora_jax/methods``, and wrappers: a new file there is a new method here.

A method may also be a function of a file of the user's, ``PATH.py:NAME`` in place of its name (``setup/user_code.py``).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import fedlora_jax.methods
import fedlora_jax.wrappers
from experiments.options import read_options, settable
from experiments.results.folder import file_name
from experiments.setup import user_code
from fedlora_jax.method import About, Method
from fedlora_jax.wrappers import AboutWrapper, order

LETTERS = re.compile(r"[\w.:=,+-]+|[\w./-]+\.py[\w.:=,+-]*", re.ASCII)
LONGEST = 200  # letters of a method with its options: folders and files are named by it


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(fedlora_jax.methods.__path__))


def wrappers() -> dict[str, AboutWrapper]:
    """All wrappers by function name."""
    return {name: about for module in _wrapper_modules() for name, about in module.ABOUT.items()}


def check(spec: str) -> None:
    """Refuse a name or an option that does not exist, a value that is none, and wrappers that do not go together."""
    _parse(spec)
    around = [part.split(":")[0] for part in spec.split("+")[1:]]
    for i, name in enumerate(around):
        order.check(name, tuple(around[:i]))


def about(spec: str) -> About:
    """Of a method with wrappers; options are part of the name shown (words without their key)."""
    parts = [_named(part) for part in spec.split("+")]
    name = parts[0][0]
    entry = _about_own(name) if user_code.is_own(name) else _module(name).ABOUT
    names = [entry.name, *(_wrapper(name)[0].name for name, _ in parts[1:])]
    shown = [name + _shown(options) for name, (_, options) in zip(names, parts, strict=True)]
    told = [text for text in (entry.tells, *(_wrapper(name)[0].tells for name, _ in parts[1:])) if text != "-"]
    return entry._replace(name=" + ".join(shown), tells=", ".join(told) or "-")


def _about_own(name: str) -> About:
    """What the ``ABOUT`` of a user's file says, an ``About`` or a dictionary of them by function; else the name."""
    path, _, function = name.partition(":")
    said = getattr(user_code.read(path).module, "ABOUT", None)
    said = said.get(function) if isinstance(said, dict) else said
    return said if isinstance(said, About) else About(function, path, "", "-", "-", "-")


def hashes(specs: Iterable[str]) -> dict[str, str]:
    """Of the files that methods are from, by path: other content is another method."""
    paths = [spec.partition(":")[0] for spec in specs if user_code.is_own(spec)]
    return {path: user_code.read(path).digest for path in paths}


def _named(part: str) -> tuple[str, list[str]]:
    """The name of a method (``PATH.py:NAME`` where it is from a file) or wrapper, and its options."""
    name, *options = part.split(":")
    if user_code.is_own(part):
        return f"{name}:{options[0] if options else ''}", options[1:]
    return name, options


def _shown(options: list[str]) -> str:
    short = [text.partition("=")[2] if text.partition("=")[2].isidentifier() else text for text in options]
    return f" ({', '.join(short)})" if options else ""


class Varied(NamedTuple):
    """An option of one part of a method with wrappers."""

    part: int
    key: str


def find(spec: str, option: str) -> Varied:
    """Where a method with wrappers has an option that is a real number.

    Args:
      spec: as for ``build``.
      option: ``KEY``, or ``NAME:KEY`` where more than one part has it.

    Raises:
      ValueError: no part has it, or several have, or it is already set.
    """
    name, _, key = option.rpartition(":")
    parts = list(zip(spec.split("+"), _parse(spec), strict=True))
    chosen = [(i, text, p) for i, (text, p) in enumerate(parts) if name in ("", _named(text)[0])]
    real = lambda make: [k for k, p in settable(make).items() if type(p.default) is float]
    found = [(i, taken) for i, _, (make, taken) in chosen if key in real(make)]
    if len(found) != 1:
        has = [f"{_named(text)[0]}:{k}" for text, (make, _) in parts for k in real(make)]
        what = "no part has" if not found else "several parts have"
        raise ValueError(f"--vary {option}: {what} such a number in {spec}; it has {', '.join(has) or 'none'}")
    part, taken = found[0]
    if key in taken:
        raise ValueError(f"--vary {option}: {spec} sets it already; leave it out there")
    return Varied(part, key)


def with_option(spec: str, option: Varied, value: float) -> str:
    """The method with one more option set, as it is written on the command line."""
    parts = spec.split("+")
    short = f"{value:g}"
    text = short if float(short) == value else repr(value)
    parts[option.part] += f":{option.key}={text.replace('e+', 'e')}"  # a plus would begin a wrapper
    return "+".join(parts)


def build(spec: str, varied: Mapping[Varied, Any] = MappingProxyType({}), **facts: Any) -> Method:
    """The method with its wrappers, each given those facts of the run that it asks for by name, and its options.

    Args:
      spec: ``PART`` or ``PART+PART+...``, the method and then the wrappers around it from the innermost, each ``NAME``
        or ``NAME:OPTION=VALUE:...``, such as ``fedit+proximal:mu=0.1+fedadam:lr=0.01``.
      varied: options on top of those in ``spec``, whose values may be traced.
      **facts: what is known of the run, such as ``participants``.
    """
    parsed = _parse(spec)
    for option, value in varied.items():
        parsed[option.part][1][option.key] = value
    inner: list[Method] = []  # a method is made of nothing, a wrapper of what is inside it
    for part, (make, options) in zip(spec.split("+"), parsed, strict=True):
        asked = {key: facts[key] for key in inspect.signature(make).parameters if key in facts}
        try:
            own = user_code.is_own(part)
            inner = [_own(part, make, facts, options) if own else make(*inner, **asked, **options)]
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from error
    return inner[0]


def _own(part: str, make: Callable[..., Method], facts: Mapping[str, Any], options: dict[str, Any]) -> Method:
    """The method of a user's file."""
    method = user_code.call(part, make, facts, options)
    if not isinstance(method, Method):
        raise ValueError(f"it returned {type(method).__name__}: expected a fedlora_jax.Method")
    return method


def asks(spec: str, fact: str) -> bool:
    """Whether the method or a wrapper around it is built for this fact of the run.

    What has an option ``epsilon`` solves for its noise where that is set; a noise that is given is the same whatever
    the fact is.
    """
    takes = [(inspect.signature(make).parameters, options) for make, options in _parse(spec)]
    return any(fact in known and ("epsilon" not in known or options.get("epsilon")) for known, options in takes)


def _parse(spec: str) -> list[tuple[Callable[..., Method], dict[str, Any]]]:
    """Of the method and each wrapper, the function that makes it and the options that are set.

    Raises:
      ValueError: no such name or option, an option set twice, a value that is none, or a text that cannot name files.
    """
    if len(file_name(spec)) > LONGEST or not LETTERS.fullmatch(spec):
        short = spec if len(spec) <= 60 else spec[:60] + "..."
        raise ValueError(
            f"{short!r} is no method: expected NAME:OPTION=VALUE+WRAPPER:OPTION=VALUE, at most {LONGEST} letters, "
            "digits and . : = , + - _ (and / in PATH.py:NAME)"
        )
    made = []
    for i, part in enumerate(spec.split("+")):
        name, options = _named(part)
        if user_code.is_own(part):
            if i > 0:
                raise ValueError(f"{part!r} is no wrapper: only methods are from files; wrap it in a function there")
            make = user_code.load(name, "a method")[0]
        else:
            make = getattr(_module(name), name) if i == 0 else _wrapper(name)[1]
        made.append((make, read_options(part, name, options, settable(make))))
    return made


def wrapper_options(name: str) -> str:
    """A wrapper's options and their defaults, to be shown."""
    return ", ".join(f"{k}={p.default}" for k, p in settable(_wrapper(name)[1]).items()) or "-"


def _module(name: str) -> Any:
    module = lambda name: importlib.import_module(f"fedlora_jax.methods.{name}")
    if name not in names():
        around = {about.name: wrapper for wrapper, about in wrappers().items()}
        if wrapper := _called(name, around):
            raise ValueError(f"{name!r} is a wrapper: put it around a method, as in fedit+{wrapper}")
        titles = {module(known).ABOUT.name: known for known in names()}
        raise ValueError(_unknown("method", name, titles))
    return module(name)


def _wrapper(name: str) -> tuple[AboutWrapper, Callable[..., Method]]:
    for module in _wrapper_modules():
        if name in module.ABOUT:
            return module.ABOUT[name], getattr(module, name)
    raise ValueError(_unknown("wrapper", name, {about.name: known for known, about in wrappers().items()}))


def _called(name: str, titles: Mapping[str, str]) -> str | None:
    """Of the names by titles, the one that is meant by ``name``, however it is written."""
    plain = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())
    same = {plain(text): known for title, known in titles.items() for text in (title, known)}
    return same.get(plain(name))


def _unknown(kind: str, name: str, titles: Mapping[str, str]) -> str:
    known = sorted(titles.values())
    if not name:
        return f"a {kind} has no name: expected one of {', '.join(known)}"
    near = _called(name, titles) or difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"unknown {kind} {name!r}: did you mean {near}? There are {', '.join(known)}"


def _wrapper_modules() -> list[Any]:
    found = sorted(module.name for module in pkgutil.iter_modules(fedlora_jax.wrappers.__path__))
    modules = [importlib.import_module(f"fedlora_jax.wrappers.{name}") for name in found]
    return [module for module in modules if hasattr(module, "ABOUT")]
