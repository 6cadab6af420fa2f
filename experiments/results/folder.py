"""The folder that a command writes: who may write it, whether it can go on, and how a file in it survives a kill.

``config.json`` comes first and says what is run: the options, what identifies data, weights and clients, versions.
While it is written the folder is locked (``.lock`` says by whom; the kernel lets go of it whatever ends the process).
Files are written beside and renamed, lines of files that grow carry a checksum, so that at any moment what is there is
whole, or can be seen not to be.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

CONFIG, LOCK = "config.json", ".lock"
BESIDE = re.compile(
    r"\.[^.].*\.(json|jsonl|png|html|npz|safetensors)\.\d+"
)  # what ``write_atomically`` leaves when killed


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path``, then rename: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """With a checksum of all the rest as its last entry."""
    return {**value, "sum": digest(json.dumps(value, allow_nan=False).encode())}


def unsealed(value: Any) -> dict[str, Any] | None:
    """What was ``sealed``; ``None`` for anything that is not as it was then."""
    if not isinstance(value, dict) or "sum" not in value:
        return None
    rest = {key: x for key, x in value.items() if key != "sum"}
    return rest if sealed(rest) == value else None


def read_json(content: bytes) -> Any:
    """``None`` for what is no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def say(text: str) -> None:
    """One line for whoever watches."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def file_name(method: str) -> str:
    """A method as the name of one file or folder: one from a file has the file's path in it."""
    return quote(method, safe=":=,+")


class Folder:
    """Where one command writes.

    Args:
      command: its name.
      out: the folder; ``None``: one of its own, below ``runs``, by the time.
      resume: go on with what is there; ``None``: the command cannot.

    Raises:
      ValueError: it cannot be written, holds something else, has nothing to resume, or somebody else is writing it.
    """

    def __init__(self, command: str, out: str | None, resume: bool | None = None):
        self._own, self._resume, self._lock, self._entered = out is None, resume, None, False
        self.path = Path(f"runs/{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}" if out is None else out)
        self._config = b""
        if resume:
            if not (self.path / CONFIG).is_file():
                raise ValueError(f"nothing to resume in {self.path}: it has no {CONFIG}")
            self._config = (self.path / CONFIG).read_bytes()
        elif not self._own and self.path.exists() and not (self.path.is_dir() and self._is_empty()):
            goes_on = resume is not None and (self.path / CONFIG).is_file()
            what = "exists and is not empty" if self.path.is_dir() else "is a file"
            raise ValueError(f"{self.path} {what}: use {'--resume to go on with it, or ' * goes_on}another --out")
        if self.path.is_dir() and (owner := _owner(self.path / LOCK)):
            raise ValueError(f"{self.path} is being written by {owner}: let it end, stop it, or use another --out")
        parent = self.path
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            what = "not writable" if parent.is_dir() else "not a folder"
            raise ValueError(f"cannot write to {self.path}: {parent} is {what}")

    def held(self, part: str) -> dict[str, Any]:
        """A part of the ``config.json`` of a run that goes on.

        Raises:
          ValueError: it is not what a run writes.
        """
        content = read_json(self._config)
        found = content.get(part) if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"cannot resume: {self.path / CONFIG} is not what a run writes: it has no {part!r}")
        return found

    def check_same(self, part: str, values: dict[str, Any], grows: Iterable[str] = ()) -> None:
        """Refuse to go on with what differs in a part of ``config.json``.

        Args:
          part: ``config`` or ``record``.
          values: what it should be.
          grows: entries that may differ by more of the same: a larger number, a list that goes on.

        Raises:
          ValueError: what differs.
        """
        before, grows, changed = self.held(part), set(grows), []
        for key, value in json.loads(json.dumps(values)).items():
            old = before.get(key)
            if old != value and not (key in grows and _more(old, value)):
                text = f"{key} was {_short(old)}, is {_short(value)}"
                changed.append(text + " (it may only have more after that)" * (key in grows))
        if changed:
            raise ValueError(f"{self.path} belongs to another configuration: {'; '.join(changed[:4])}")

    def __enter__(self) -> Path:
        """Make the folder and keep others out of it.

        Raises:
          OSError: it cannot be written, or somebody else was faster.
        """
        stem, count = self.path.name, 1
        while self._own:
            try:
                self.path.mkdir(parents=True)
                break
            except FileExistsError:  # of a run that began in the same second
                count += 1
                self.path = self.path.with_name(f"{stem}-{count}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock, self._entered = _locked(self.path / LOCK), True
        config = self.path / CONFIG
        if (config.read_bytes() if config.exists() else b"") != self._config or not (self._resume or self._is_empty()):
            self.__exit__()
            raise FileExistsError(f"somebody else has written to {self.path} since this command began")
        for left in filter(_is_left_over, self.path.iterdir()):
            left.unlink(missing_ok=True)
        return self.path

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def command(self) -> str:
        """That goes on with what is here; where there is nothing yet, or it cannot be, that begins anew."""
        began = self._entered and self._resume is not None and (self.path / CONFIG).exists()
        out = ["--out", str(self.path)] if self._own and began else []
        return command([*out, *(["--resume"] if began and not self._resume else [])])

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Is it in there, or on the way?"""
        here, there = self.path.absolute(), Path(path).absolute()
        return there.is_relative_to(here) or here.is_relative_to(there)

    def _is_empty(self) -> bool:
        return all(path.name == LOCK or _is_left_over(path) for path in self.path.iterdir())


def command(more: Iterable[str] = ()) -> str:
    """What was typed to start this process, and more."""
    return shlex.join([*program(), *sys.argv[1:], *more])


def program() -> tuple[str, ...]:
    """By which this process was started: the console script, or the module."""
    return ("fedlora",) if Path(sys.argv[0]).name == "fedlora" else ("python", "-m", "experiments")


def asked(out: str) -> dict[str, Any]:
    """The options of the run in a folder, as they were written; empty where there are none to be read."""
    try:
        content = read_json((Path(out) / CONFIG).read_bytes())
    except OSError:
        return {}
    parts = [content.get(part) for part in ("config", "speed")] if isinstance(content, dict) else []
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


def _is_left_over(path: Path) -> bool:
    return bool(BESIDE.fullmatch(path.name)) and path.is_file()


def _more(before: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return before is None or (isinstance(before, dict) and before.items() <= value.items())
    if isinstance(value, list):
        return isinstance(before, list) and value[: len(before)] == before
    return type(before) is type(value) is int and value >= before


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _locked(path: Path) -> TextIO:
    """The lock of a folder, which is ours as long as the file is open."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BlockingIOError(f"{path.parent} is being written by {_owner(path) or 'somebody else'}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise
            say(f"{path.parent} is on a file system without locks: see to it that nothing else writes there")
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # whoever held it has just removed it
    file.truncate(0)
    began = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {began} ({command()})\n")
    file.flush()
    return file


def _owner(path: Path) -> str | None:
    """Who holds a lock; ``None``: nobody."""
    with contextlib.suppress(OSError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "somebody else"
    return None
