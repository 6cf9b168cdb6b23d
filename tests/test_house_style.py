"""The limits of the house style that a machine can hold."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokencredit.methods.table import ESTIMATORS, TRANSFORMS

ROOT = Path(__file__).parent.parent
SOURCES = {path: path.read_text() for path in sorted((ROOT / "src").rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in SOURCES.items()}
METHODS = ESTIMATORS | TRANSFORMS
FUNCTION_LINES = 60  # docstring not counted
FILE_LINES = 400
ARGUMENTS = 8
MANY_ARGUMENTS = re.compile(r"# noqa: PLR0913 - \w+")  # the only way out, with its reason

Function = ast.FunctionDef | ast.AsyncFunctionDef
every_method = pytest.mark.parametrize("name", sorted(METHODS))


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines from `def` to the end, without decorators and docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def arguments(function: Function) -> list[str]:
    found = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in found if argument.arg not in ("self", "cls")]


def offenders(rule: Callable[[str, ast.Module], object]) -> dict[str, object]:
    """What `rule` finds in each file of the package; files without a finding are left out."""
    found = {str(path.relative_to(ROOT)): rule(text, TREES[path]) for path, text in SOURCES.items()}
    return {path: finding for path, finding in found.items() if finding}


def too_long(text: str, tree: ast.Module) -> int:
    lines = len(text.splitlines())
    return lines if lines > FILE_LINES else 0


def long_functions(text: str, tree: ast.Module) -> dict[str, int]:
    return {f.name: body_lines(f) for f in functions(tree) if body_lines(f) > FUNCTION_LINES}


def many_arguments(text: str, tree: ast.Module) -> dict[str, int]:
    lines = text.splitlines()
    many = (f for f in functions(tree) if len(arguments(f)) > ARGUMENTS)
    return {f.name: len(arguments(f)) for f in many if not MANY_ARGUMENTS.search(lines[f.lineno - 1])}


def postponed_annotations(text: str, tree: ast.Module) -> bool:
    # the type checker would see strings and stay silent
    return re.search(r"^from __future__ import .*annotations", text, re.MULTILINE) is not None


def undocumented(text: str, tree: ast.Module) -> list[str]:
    public = (node for node in tree.body if isinstance(node, Function) and not node.name.startswith("_"))
    return [node.name for node in public if ast.get_docstring(node) is None]


@pytest.mark.parametrize("rule", [too_long, long_functions, many_arguments, postponed_annotations, undocumented])
def test_the_package_keeps(rule: Callable[[str, ast.Module], object]) -> None:
    assert offenders(rule) == {}


@every_method
def test_methods_state_equation_and_source(name: str) -> None:
    text = inspect.getdoc(METHODS[name].fn) or ""
    equations = [line for line in text.splitlines() if line.startswith("    ") and "=" in line]
    assert equations, f"{name}: no indented line with an equation"
    assert re.search(r"^(Paper|Source): \S", text, re.MULTILINE), f"{name}: no line `Paper: …` or `Source: …`"


PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))


def test_methods_have_a_page() -> None:
    text = "".join(path.read_text() for path in PAGES)
    assert [name for name in sorted(METHODS) if f"`{name}`" not in text] == []


def test_tables_in_the_pages_are_current() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    tables = importlib.import_module("tables")
    sys.path.remove(str(ROOT / "docs"))
    stale = [path.name for path in PAGES if tables.refreshed(path.read_text()) != path.read_text()]
    assert stale == [], "run `python docs/tables.py`"


HEADINGS = ["Equation", "Inputs", "Hyperparameters", "Laws", "Deviations", "Figures"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_have_the_same_headings(path: Path) -> None:
    found = [line[3:] for line in path.read_text().splitlines() if line.startswith("## ")]
    assert found == HEADINGS


@pytest.mark.parametrize(
    ("source", "lines", "count"),
    [
        ("def f(a):\n    return a", 2, 1),
        ('def f(\n    self,\n    a,\n    *,\n    b=1,\n):\n    """One.\n\n    Two.\n    """\n    return a', 7, 2),
    ],
)
def test_the_counters_count(source: str, lines: int, count: int) -> None:
    (function,) = functions(ast.parse(source))
    assert body_lines(function) == lines
    assert len(arguments(function)) == count
