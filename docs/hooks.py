"""What the site has that no page of ``docs`` is: the README as its first page, the API, examples. A hook of mkdocs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
API = (  # modules of the library, in the order in which a reader needs them
    *("lora", "method", "rounds", "training", "clients", "batches", "partition", "product", "signatures", "meta"),
    *("task", "dropout", "clustering", "diagnostics"),
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of other files."""
    from mkdocs.structure.files import File

    pages = {"index.md": (ROOT / "README.md").read_text(), "api.md": api()}
    pages |= {f"examples/{path.stem}.md": example(path) for path in sorted((ROOT / "examples").glob("*.py"))}
    notebooks = sorted((ROOT / "examples" / "notebooks").glob("*.py"))
    pages |= {f"examples/notebooks/{path.stem}.md": notebook(path) for path in notebooks}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as they are on the site: the README lies among the pages, and examples are pages."""
    markdown = markdown.replace("](docs/", "](").replace("](../README.md", "](index.md")
    return re.sub(r"\]\((?:\.\./)?examples/((?:notebooks/)?\w+)\.py\)", r"](examples/\1.md)", markdown)


def api() -> str:
    """One page of everything that is public, from docstrings."""
    parts = [
        "# API",
        "`import fedlora_jax as fl`: all methods and wrappers are functions of it, `fl.fedadam(fl.fedit())`.",
    ]
    for name in API:
        parts += [f"## {name}", f"::: fedlora_jax.{name}\n    options: {{heading_level: 3, show_root_heading: false}}"]
    for package in ("methods", "wrappers"):
        files = sorted((ROOT / "fedlora_jax" / package).glob("*.py"))
        names = [path.stem for path in files if re.search("^ABOUT", path.read_text(), re.MULTILINE)]
        parts += [
            f"## {package}",
            *(f"::: fedlora_jax.{package}.{name}\n    options: {{heading_level: 3}}" for name in names),
        ]
    return "\n\n".join(parts) + "\n"


def example(path: Path) -> str:
    """An example as a page: what it says of itself, and its code."""
    code = path.read_text()
    said = ast.get_docstring(ast.parse(code)) or ""
    return f"# {path.stem.replace('_', ' ').capitalize()}\n\n{said}\n\n```python\n{code}```\n"


def notebook(path: Path) -> str:
    """A notebook, a script whose cells begin with ``# %%``, as a page."""
    parts = []
    for cell in re.split(r"^# %%", path.read_text(), flags=re.MULTILINE)[1:]:
        kind, _, text = cell.partition("\n")
        plain = re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip()
        parts.append(plain if "[markdown]" in kind else f"```python\n{text.strip()}\n```")
    title, _, rest = "\n\n".join(parts).partition("\n")
    where = f"`examples/notebooks/{path.name}`"
    told = f"*A script that runs as it is: {where}. `jupytext --to notebook {path.name}` makes a notebook of it.*"
    return f"{title}\n\n{told}\n{rest}\n"
