"""Where this user keeps what can be made again: compiled programs, decoded images."""

import os
from pathlib import Path


def caches() -> Path:
    """``$XDG_CACHE_HOME``, else ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
