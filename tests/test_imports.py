"""Imports inside the package form no circle: at any depth, inside functions, under names in strings, lazily."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((SOURCE / "tokencredit").rglob("*.py"))}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
# It lists the whole package by name to import one module of it.
LISTS = {"tokencredit.moved"}


def imports(tree: ast.AST, package: str, modules: Iterable[str]) -> Iterator[str]:
    """Names of modules that a file imports or names in a string, `module:attribute` and f-strings included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            named = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else base for name in named)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name, colon, _ = node.value.partition(":")
            if colon or name not in PACKAGES:  # a loader of templates names its package, and imports nothing of it
                yield name


def import_graph(modules: Mapping[str, Path], lists: Iterable[str] = ()) -> dict[str, set[str]]:
    graph = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = set(imports(ast.parse(path.read_text()), package, modules.keys()))
        graph[name] = set() if name in lists else (found & modules.keys()) - {name}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other (strongly connected components of more than one)."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, queue = set(), [*graph[start]]
        while queue:
            name = queue.pop()
            if name not in seen:
                seen.add(name)
                queue += graph[name]
        reached[start] = seen
    groups = {frozenset({name} | {other for other in reached[name] if name in reached[other]}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_module_reaches_itself() -> None:
    assert circles(import_graph(MODULES, LISTS)) == []


def test_a_circle_is_found_whatever_the_import_looks_like(tmp_path: Path) -> None:
    texts = {
        "a": "import p.b",
        "b": "def f():\n    from p import c",
        "c": "LAZY = 'p.a:function'",
        "d": "from p import a",
        "e": "from importlib import import_module\nmodule = import_module('p.f')",
        "f": "from .e import module",
    }
    modules = {}
    for name, text in texts.items():
        modules[f"p.{name}"] = tmp_path / f"{name}.py"
        modules[f"p.{name}"].write_text(text)
    assert circles(import_graph(modules)) == [["p.a", "p.b", "p.c"], ["p.e", "p.f"]]
