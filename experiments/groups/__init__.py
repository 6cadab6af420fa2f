"""What a user can set of a run, by group: frozen dataclasses, the only place where a default lives.

The name of a class is that of its group (``--help NAME``), its docstring what it is about. ``Config`` is all of them.
"""
