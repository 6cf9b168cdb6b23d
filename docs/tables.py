"""Writes the tables of hyperparameters into the method pages: `python docs/tables.py`.

A page holds `<!-- hyperparameters: NAME … -->` and `<!-- end -->`; what stands between them is generated from the
signatures and the table of methods, so that a default is declared once.
"""

import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tokencredit.methods.spec import Endpoints
from tokencredit.methods.table import ESTIMATORS, TRANSFORMS

METHODS = ESTIMATORS | TRANSFORMS
BLOCK = re.compile(r"(<!-- hyperparameters: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
    return BLOCK.sub(lambda match: match[1] + table(match[2].split()) + match[3], page)


if __name__ == "__main__":
    for path in sorted((Path(__file__).parent / "methods").glob("*.md")):
        path.write_text(refreshed(path.read_text()))
