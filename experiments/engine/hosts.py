"""A run that several processes share, usually one on each host: all compute, the first alone reads, writes and prints.

Every process is started with the same command and holds the same problem; what the first was told counts for all. A
process that is lost takes the others with it: those whose computation breaks off say so, and of those that jax ends,
which it does without words of ours, a small process that watches says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

SILENT = 30  # seconds without a sign of life after which a process is lost; a connection that breaks is seen at once
BROKEN = ("gloo", "nccl", "coordination", "connection", "socket", "peer", "heartbeat")  # words of what breaks off

WATCH = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr, flush=True)"  # until nobody can write


class Joined(NamedTuple):
    """This process among those that share a run."""

    name: str = ""  # before an error of its own; of the first, which speaks for all, ""
    leave: Callable[[], None] = lambda: None  # it ends with a word of its own, or needs none: nobody has to watch


ALONE = Joined()


def join(hosts: int, devices: int, coordinator: str | None, process_id: int | None) -> Joined:
    """Become one of the processes that share a run, before jax looks for devices.

    Args:
      hosts: how many they are.
      devices: of each.
      coordinator, process_id: of ``jax.distributed.initialize``; ``None``: as SLURM, a TPU, Open MPI or Kubernetes say.

    Raises:
      ValueError: nothing says where the others are, they are not so many, or they do not come.
    """
    if hosts == 1:
        return ALONE
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    own: dict[str, Any] = {"num_processes": hosts, "cluster_detection_method": "deactivate"} if coordinator else {}
    if devices > 1:  # or under SLURM jax would leave one to each process
        own["local_device_ids"] = range(devices)
    if process_id == 0:
        print(f"note: waiting for {hosts - 1} more of {hosts} processes at {coordinator}", file=sys.stderr, flush=True)
    leave = _watched(f"one of {hosts} processes" if process_id is None else f"process {process_id} of {hosts}")
    try:
        jax.distributed.initialize(coordinator, process_id=process_id, heartbeat_timeout_seconds=SILENT, **own)
    except ValueError as error:
        leave()
        raise ValueError(
            f"--hosts {hosts}: no SLURM, TPU, Open MPI or Kubernetes says where the others are ({error}): give "
            "--coordinator HOST:PORT and --process-id"
        ) from None
    except RuntimeError as error:
        leave()
        where = f" at {coordinator}" if coordinator else ""
        raise ValueError(f"--hosts {hosts}: the others cannot be reached{where}: {_first_line(error)}") from None
    if jax.process_count() != hosts:
        leave()
        raise ValueError(f"--hosts {hosts}: {jax.process_count()} processes were started")
    number = jax.process_index()
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo's own words
    return Joined(f"process {number} of {hosts}: " if number else "", leave)


def _watched(name: str) -> Callable[[], None]:
    """Have a small process say so where this one ends without a word; returns what tells it that there is no need."""
    then = "start all again, with --out and --resume where it had begun"
    line = f"error: {name} was killed, or ended because another was lost or did not come; {then}"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    watch = subprocess.Popen([sys.executable, "-S", "-c", WATCH, line], **pipes, start_new_session=True)  # type: ignore

    def leave() -> None:
        with contextlib.suppress(OSError, ValueError):
            watch.communicate(b"ended")

    return leave


def leads() -> bool:
    """Is this the process that reads, writes and prints?"""
    return jax.process_index() == 0


@contextlib.contextmanager
def together(joined: Joined, goes_on: Callable[[], str]) -> Iterator[None]:
    """While this lasts this process, where it ends, takes the others with it; at the end all part."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        broken = lost(error)
        if broken:
            print(f"error: {joined.name}{broken}; {goes_on()}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        joined.leave()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
    if jax.process_count() > 1:
        joined.leave()
        jax.distributed.shutdown()  # waits for the others


def refused(here: bool) -> bool:
    """Whether any of them refuses what all are to do; then they part."""
    if jax.process_count() == 1:
        return here
    there = bool(multihost_utils.process_allgather(np.int32(here)).any())
    if there:
        jax.distributed.shutdown()
    return there


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The first process alone speaks; what ends another is raised, and said outside."""
    with contextlib.ExitStack() as stack:
        if not leads():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def agreed(value: Any) -> Any:
    """What the first process has, of JSON, in all of them."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value if leads() else None).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(text, size))))


def agreed_arrays(tree: Any) -> Any:
    """The same of arrays, which have the same shapes everywhere; in NumPy."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: _through(multihost_utils.broadcast_one_to_all, x), tree)


def local(tree: Any) -> Any:
    """Arrays that every process has, each for itself."""
    one = lambda x: x if x.is_fully_addressable else _through(np.asarray, x)
    return jax.tree.map(one, tree)


def placed(tree: Any, where: NamedSharding | None) -> Any:
    """Arrays that every process has, on all devices that share a run; ``where`` is ``None`` if that is one."""
    if where is None:
        return tree
    if jax.process_count() == 1:
        return jax.device_put(tree, where)

    put = lambda x: jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    there = lambda x: isinstance(x, jax.Array) and x.sharding == where
    return jax.tree.map(lambda x: x if there(x) else _through(put, x), tree)


def lost(error: BaseException) -> str | None:
    """One line about an error that another process's end has caused, where it is one."""
    text = _first_line(error)
    of_jax = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
    broken = of_jax and any(word in text.lower() for word in BROKEN)
    return f"another process of this run was lost ({text[:200]})" if broken else None


def _through(change: Callable, x: Any) -> Any:
    """``change`` of an array on the host; of random keys, of their data."""
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(change(np.asarray(jax.random.key_data(x))))
    return change(np.asarray(x))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
