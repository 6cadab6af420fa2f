"""Ctrl-C, SIGTERM and SIGHUP end a command at once, with one line, whatever it is computing or compiling.

Nothing is unwound: what is on disk survives a kill (``folder.py``, ``record.py``), and the rounds at hand are dropped.
A handler written in Python would wait until compiled code returns; a thread that the system's handler
wakes does not.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stoppable(last_words: Callable[[], str]) -> Iterator[None]:
    """While this lasts a signal ends the process with 128 + its number, after ``last_words``. From the main thread.

    What is ignored (by ``nohup``) stays ignored.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] in SIGNALS:
                name = signal.Signals(number[0]).name
                os.write(2, f"\nstopped by {name}; {last_words()}\n".encode())
                os._exit(128 + number[0])
        os.close(read)

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda *_: None) for number in heeded}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)
