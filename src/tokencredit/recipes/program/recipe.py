"""Recipe files: parsing, validation, canonical form, hashes and differences."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import dump_yaml, read_yaml
from tokencredit.recipes.program.operators.spec import missing_default
from tokencredit.recipes.program.operators.table import OPERATORS
from tokencredit.settings import Settings, wrong_value

Params = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operator with its parameters, defaults left out or filled in alike."""

    op: str
    params: Params = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An ordered program; `id` and `parent` are names for people and enter no hash."""

    steps: tuple[Step, ...]
    id: str = ""
    parent: str = ""

    def __str__(self) -> str:
        return " → ".join(f"{step.op}({_brief(step.params)})" for step in self.steps) or "full pool"


def _brief(params: Params) -> str:
    shown = []
    for key, value in params.items():
        if isinstance(value, list):
            shown.append(",".join(value))
        elif key != "seed":
            shown.append(
                f"{key}={value}" if isinstance(value, bool) or key in {"clusters", "low", "high"} else f"{value}"
            )
    return " ".join(shown)


@cache
def accepted(op: str) -> dict[str, inspect.Parameter]:
    """The hyperparameters of an operator, from the signature of its function."""
    if op not in OPERATORS:
        raise unknown("operator", op, OPERATORS)
    parameters = inspect.signature(OPERATORS[op].fn).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def make_step(op: str, **params: Any) -> Step:
    """A validated step; `top` with a budget of tokens is the operator `top_tokens`."""
    if op == "top" and "tokens" in params:
        op = "top_tokens"
    known = accepted(op)
    for name in params:
        if name not in known:
            raise unknown(f"parameter of {op}", name, known)
    values = {name: _plain_value(value) for name, value in params.items() if value is not None}
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in values:
            hint = "a draw without a seed cannot be repeated" if name == "seed" else None
            raise TokenCreditError(f"{op} needs `{name}`", hint=hint)
    for name, value in values.items():
        kind, adapter = _type_of(op, name)
        try:
            adapter.validate_python(value)
        except ValidationError:
            raise wrong_value(f"{op}.{name}", value, kind) from None
    sizes = [name for name in ("fraction", "k") if name in values]
    if op in {"top", "top_union"} and len(sizes) != 1:
        raise TokenCreditError(f"{op} needs exactly one of fraction and k; got {', '.join(sizes) or 'none'}")
    if op == "band" and not values["low"] < values["high"]:
        raise TokenCreditError(f"band needs low < high, got {values['low']} and {values['high']}")
    return Step(op=op, params=values)


@cache
def _type_of(op: str, name: str) -> tuple[Any, TypeAdapter]:
    """The type of a parameter without its null, and what checks it."""
    annotation = accepted(op)[name].annotation
    kind = next((part for part in get_args(annotation) if NoneType in get_args(annotation)), annotation)
    return kind, TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _plain_value(value: Any) -> Any:
    """NumPy's numbers, texts and arrays as Python's; a float32 becomes the float with the same shortest spelling."""
    if isinstance(value, np.ndarray | tuple):
        return [_plain_value(item) for item in value]
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def make_recipe(steps: Sequence[Any], id: str = "", parent: str = "") -> Recipe:
    """A validated recipe from steps in any of their spellings.

    A step is `{op: top, signal: ifd, fraction: 0.5}`, `{top: {signal: ifd, fraction: 0.5}}`, or the name of an operator
    without parameters.
    """
    made = []
    for number, step in enumerate(steps, start=1):
        if isinstance(step, Step):
            made.append(step)
            continue
        op, params = _spelled(number, step)
        made.append(make_step(op, **params))
    return Recipe(steps=tuple(made), id=id, parent=parent)


def _spelled(number: int, step: Any) -> tuple[str, Params]:
    """The operator and the parameters of a step as a file spells it."""
    if isinstance(step, str):
        return step, {}
    if isinstance(step, Mapping) and all(isinstance(key, str) for key in step):
        if isinstance(step.get("op"), str):
            return step["op"], {key: value for key, value in step.items() if key != "op"}
        if len(step) == 1:
            ((op, params),) = step.items()
            named = isinstance(params, Mapping) and all(isinstance(key, str) for key in params)
            if params is None or named:
                return op, dict(params or {})
    raise TokenCreditError(
        f"step {number} must be a mapping with `op`, or {{OPERATOR: {{…}}}}, got {step!r}",
        hint="write {op: top, signal: ppl, fraction: 0.5} or {top: {signal: ppl, fraction: 0.5}}",
    )


class _About(Settings):
    """`recipe:` of a recipe file."""

    section: ClassVar[str] = "recipe"

    id: str | int | None = None
    parent: str | int | None = None
    pool: str | None = None


class _RecipeFile(Settings):
    """A recipe file that is a mapping."""

    key_kind: ClassVar[str] = "key of a recipe file"

    recipe: _About = _About()
    steps: list[Any]


def load_recipe(path: Path | str) -> tuple[Recipe, str | None]:
    """A recipe from a YAML file, and the hash of the pool that it was written for, if it says.

    The file is a list of steps, or a mapping with `steps` and, where the recipe has a name, `recipe`.
    """
    content = read_yaml(Path(path), "recipe file")
    if isinstance(content, list):
        content = {"steps": content}
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise TokenCreditError(
            f"{path} must be a list of steps, or a mapping with a list `steps`",
            hint="write `steps: [{op: top, signal: ppl, fraction: 0.5}]`",
        )
    file = _RecipeFile.read(content)
    recipe = make_recipe(file.steps, str(file.recipe.id or ""), str(file.recipe.parent or ""))
    return recipe, file.recipe.pool.removeprefix("sha256:") if file.recipe.pool else None


def dump_recipe(recipe: Recipe, pool_hash: str) -> str:
    """The YAML text of a recipe file."""
    about = {key: value for key, value in (("id", recipe.id), ("parent", recipe.parent)) if value}
    content = {"recipe": {**about, "pool": f"sha256:{pool_hash}"}, "steps": as_mappings(recipe)}
    return dump_yaml(content)


def as_mappings(recipe: Recipe) -> list[dict[str, Any]]:
    """Steps as a recipe file spells them."""
    return [{"op": step.op, **step.params} for step in recipe.steps]


def canonical(steps: Sequence[Step]) -> str:
    """Compact JSON with sorted keys, defaults filled in, numbers as shortest decimal strings and `op@version`.

    What is absent (`k` beside `fraction`) and flags at their default stay out.
    """
    return json.dumps([_canonical_step(step) for step in steps], sort_keys=True, separators=(",", ":"))


def _canonical_step(step: Step) -> dict[str, Any]:
    filled: dict[str, Any] = {"op": f"{step.op}@{OPERATORS[step.op].version}"}
    for name, parameter in accepted(step.op).items():
        value = step.params.get(name, parameter.default)
        if name == "missing" and value is None:
            signals = step.params.get("signals") or [step.params["signal"]]
            value = missing_default(signals)
        if value is None or (isinstance(value, bool) and value == parameter.default):
            continue
        filled[name] = _shortest(value)
    return filled


def _shortest(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    text = format(Decimal(str(value)).normalize(), "f")  # a NumPy number's repr names its type
    return "0" if text == "-0" else text


def used_signals(steps: Sequence[Step]) -> list[str]:
    """The signals that steps read, sorted."""
    names: set[str] = set()
    for step in steps:
        names.update(step.params.get("signals", ()))
        if "signal" in step.params:
            names.add(step.params["signal"])
        if str(step.params.get("keep", "")).startswith("best:"):
            names.add(step.params["keep"].removeprefix("best:"))
    return sorted(names)


def diff(parent: Recipe, child: Recipe) -> list[tuple[str, str, int]]:
    """Edits (kind, operator, position) that turn the parent into the child.

    Steps are aligned by their longest common subsequence of operators; an aligned step with other parameters is
    `retune` at the child's position, the rest is `insert` (child's position) and `delete` (parent's position). A moved
    step shows as a deletion and an insertion.
    """
    a, b = parent.steps, child.steps
    length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            same = a[i].op == b[j].op
            length[i][j] = 1 + length[i + 1][j + 1] if same else max(length[i + 1][j], length[i][j + 1])
    edits, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        if i < len(a) and j < len(b) and a[i].op == b[j].op:
            if _canonical_step(a[i]) != _canonical_step(b[j]):
                edits.append(("retune", b[j].op, j))
            i, j = i + 1, j + 1
        elif j < len(b) and (i == len(a) or length[i][j + 1] >= length[i + 1][j]):
            edits.append(("insert", b[j].op, j))
            j += 1
        else:
            edits.append(("delete", a[i].op, i))
            i += 1
    return edits
