"""The tables of methods, put together from the rows at the end of each file of this package.

They are the same in every process; tests, docs, the command line and adapters read them.
"""

import pkgutil
import sys
from collections.abc import Collection, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.methods.spec import Alias, MethodSpec, Rows


def read_rows() -> dict[str, Rows]:
    """The `ROWS` of every file of the package, by module name."""
    files = pkgutil.walk_packages(sys.modules[__package__].__path__, f"{__package__}.")
    modules = [import_module(name) for name in sorted(file.name for file in files) if name != __name__]
    return {module.__name__: module.ROWS for module in modules if isinstance(vars(module).get("ROWS"), Rows)}


def merge_rows(kind: str, files: Mapping[str, Rows]) -> dict[str, Any]:
    """One table of all files; a name belongs to one row."""
    merged: dict[str, Any] = {}
    for module, rows in files.items():
        added = getattr(rows, kind)
        taken = sorted(merged.keys() & added.keys())
        if taken:
            raise TokenCreditError(f"{module} takes the name {taken[0]!r}, which {kind} have", hint="rename the row")
        merged |= added
    return merged


_FILES = read_rows()
ESTIMATORS: dict[str, MethodSpec] = merge_rows("estimators", _FILES)
TRANSFORMS: dict[str, MethodSpec] = merge_rows("transforms", _FILES)
PRESETS: dict[str, list[Any]] = merge_rows("presets", _FILES)
ALIASES: dict[str, Alias] = merge_rows("aliases", _FILES)
CONTROLS: dict[str, list[Any]] = merge_rows("controls", _FILES)

# The host's own advantages as an estimator and as a preset, and the preset of exact credit.
HOST_ESTIMATOR = next(name for name, spec in ESTIMATORS.items() if spec.is_host_baseline)
EXACT_ESTIMATOR = next(name for name, spec in ESTIMATORS.items() if spec.is_exact)
BASELINE, EXACT = (
    next(name for name, steps in PRESETS.items() if steps == [estimator])
    for estimator in (HOST_ESTIMATOR, EXACT_ESTIMATOR)
)


@cache
def estimators() -> Mapping[str, MethodSpec]:
    """`ESTIMATORS` and those of installed packages (entry-point group `tokencredit.estimators`)."""
    return ESTIMATORS | _load_third_party("estimators", ESTIMATORS, MethodSpec)


@cache
def transforms() -> Mapping[str, MethodSpec]:
    """`TRANSFORMS` and those of installed packages (entry-point group `tokencredit.transforms`)."""
    return TRANSFORMS | _load_third_party("transforms", TRANSFORMS, MethodSpec)


@cache
def presets() -> Mapping[str, list[Any]]:
    """`PRESETS` and those of installed packages (entry-point group `tokencredit.presets`)."""
    return PRESETS | _load_third_party("presets", PRESETS.keys() | ALIASES.keys(), list)


def find_preset(name: str) -> list[Any] | None:
    """The steps of a preset or of an alias of one; None for other names."""
    alias = ALIASES.get(name)
    return presets().get(name if alias is None else alias.of)


def _load_third_party(kind: str, ours: Collection[str], expected: type) -> dict[str, Any]:
    rows = {}
    for point in entry_points(group=f"tokencredit.{kind}"):
        if point.name in ours:
            raise TokenCreditError(
                f"{point.value} takes the name {point.name!r}, which tokencredit has", hint="rename the entry point"
            )
        loaded = point.load()
        if not isinstance(loaded, expected):
            raise TokenCreditError(f"{point.value} must be a {expected.__name__}, got {type(loaded).__name__}")
        rows[point.name] = loaded
    return rows
