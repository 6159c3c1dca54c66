"""Functions stay small enough to be read at once; lines of code, without docstring and comments."""

import ast
import statistics
from pathlib import Path

import pyro_scanvi

ROOT = Path(pyro_scanvi.__file__).parent
MEDIAN, LONGEST, DEEPEST = 6, 60, 3
NESTS = (ast.If, ast.For, ast.While, ast.With, ast.Try)
OTHERS = (ast.FunctionDef, ast.ClassDef, ast.Lambda)


def functions():
    """Name, lines of source and node of every function."""
    for path in ROOT.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(ROOT)}:{node.name}", source.splitlines(), node


def n_lines(lines, node):
    """Of the signature and the body."""
    doc = node.body[0] if ast.get_docstring(node) else None
    skipped = set() if doc is None else set(range(doc.lineno, doc.end_lineno + 1))
    numbers = [n for n in range(node.lineno, node.end_lineno + 1) if n not in skipped]
    return sum(bool(lines[n - 1].strip().split("#")[0]) for n in numbers)


def depth(node):
    """How many blocks of one function lie in one another."""
    inner = [depth(n) for n in ast.iter_child_nodes(node) if not isinstance(n, OTHERS)]
    return max(inner, default=0) + isinstance(node, NESTS)


def test_half_of_the_functions_are_short_and_none_is_long():
    lengths = {name: n_lines(lines, node) for name, lines, node in functions()}
    assert len(lengths) > 500
    assert statistics.median(lengths.values()) <= MEDIAN
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_nothing_is_nested_deeply():
    deep = {name: depth(node) for name, _, node in functions() if depth(node) > DEEPEST}
    assert deep == {}


def test_the_measures_measure():
    source = 'def f(a):\n    """Two\n    lines."""\n    # why\n    if a:\n        return 1\n'
    node = ast.parse(source).body[0]
    assert n_lines(source.splitlines(), node) == 3 and depth(node) == 1
