"""Writes the generated tables into the pages: `python docs/tables.py`.

A page holds `<!-- hyperparameters: NAME … -->` or `<!-- collectors -->`, and `<!-- end -->`. What is between them is
generated from the signatures and the tables, so that a default is declared once.
"""

import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tokencredit.collect.table import TABLE
from tokencredit.methods.spec import Endpoints
from tokencredit.methods.table import ESTIMATORS, TRANSFORMS

METHODS = ESTIMATORS | TRANSFORMS
BLOCK = re.compile(r"(<!-- hyperparameters: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLLECTORS = re.compile(r"(<!-- collectors -->\n).*?(<!-- end -->)", re.DOTALL)


def table(names: list[str]) -> str:
    """One line for every hyperparameter of the named methods."""
    lines = ["| method | hyperparameter | default | accepted |", "|---|---|---|---|"]
    for name in names:
        spec = METHODS[name]
        for key, default in spec.defaults.items():
            annotation = inspect.signature(spec.fn).parameters[key].annotation
            accepted = spec.domains.get(key) or describe(annotation)
            lines.append(f"| `{name}` | `{key}` | `{default!r}` | {accepted} |")
        if not spec.defaults:
            lines.append(f"| `{name}` | none | | |")
    return "\n".join(lines) + "\n"


def collector_table() -> str:
    """One line for every collector, and one for each of its options."""
    hosts = {None: "–", "host": "its own", "tapped": "read off its passes", "pass": "a pass more"}
    lines = ["| field | TRL | verl | needs | option | default | accepted |", "|---|---|---|---|---|---|---|"]
    for name, row in TABLE.items():
        start = f"| `{name}` | {hosts[row.trl]} | {hosts[row.verl]} | {row.needs or ''} |"
        options = [f" `{key}` | {yaml_value(one.default)} | {one.accepted} |" for key, one in row.options.items()]
        first, *others = options or [" | | |"]
        lines += [start + first, *("| | | | |" + option for option in others)]
    return "\n".join(lines) + "\n"


def yaml_value(value: Any) -> str:
    """A default as a config writes it."""
    return "null" if value is None else f"`{value}`"


def describe(annotation: Any) -> str:
    """What an annotation accepts, in words."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice!r}`" for choice in get_args(annotation))
    inner = [arg for arg in get_args(annotation) if get_origin(arg) is Literal]
    if inner:
        return f"a list out of {describe(inner[0])}"
    words: dict[Any, str] = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        float | None: "a number or nothing",
        Endpoints | None: "two numbers of at least 0, or nothing",
    }
    return words.get(annotation, str(annotation))


def refreshed(page: str) -> str:
    """The text of a page with its tables generated anew."""
    page = COLLECTORS.sub(lambda match: match[1] + collector_table() + match[2], page)
    return BLOCK.sub(lambda match: match[1] + table(match[2].split()) + match[3], page)


if __name__ == "__main__":
    for path in (Path(__file__).parent / "configs.md", *sorted((Path(__file__).parent / "methods").glob("*.md"))):
        path.write_text(refreshed(path.read_text()))
