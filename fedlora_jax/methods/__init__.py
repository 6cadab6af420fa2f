"""One file per method. Each file ``name.py`` holds a function ``name(...) -> Method`` and its ``ABOUT``."""
