"""No function is longer than a page: 60 lines of code; docstrings, comments and blank lines are not counted."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 60
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lengths(source):
    """Lines of code of every function by name, those of the functions inside it included."""
    tree, lines = ast.parse(source), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return {
        f"{f.name} (line {f.lineno})": len(lines & set(range(f.lineno, (f.end_lineno or 0) + 1))) for f in functions
    }


@pytest.mark.parametrize("package", ["fedlora_jax", "models", "experiments"])
def test_no_function_is_longer_than_a_page(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    long = [f"{path.relative_to(ROOT)}: {name} has {n} lines of code" for path in paths
            for name, n in lengths(path.read_text()).items() if n > LONGEST]  # fmt: skip
    assert not long, f"{'; '.join(long)}: make module functions of what is inside, over a small settings tuple"


def test_only_code_counts():
    source = '''
def f(
    x,
):
    """Says
    what."""

    # why
    def g():
        return """
"""

    return g
'''
    assert lengths(source) == {"f (line 2)": 7, "g (line 9)": 3}
