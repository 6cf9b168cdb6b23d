"""What a user, a file or a host may hand over: values of every kind, credit configs, fields of a batch."""

from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tokencredit.batch.records import OPTIONAL_FIELDS, TOKEN_FIELDS
from tokencredit.methods.table import estimators, presets, transforms

NAMES = sorted({*presets(), *estimators(), *transforms()})
PARAMETERS = sorted(
    {name for table in (estimators(), transforms()) for spec in table.values() for name in spec.defaults}
)
MODULES = [
    *(
        "math:pi",
        "math:sqrt",
        ":x",
        ".x:y",
        "a:",
        ":",
        "a:b:c",
        "tokencredit.pipeline.pipeline:Pipeline",
        "os.path:join",
        "..:f",
    ),
    *(
        "builtins:int",
        "builtins:print",
        "no_such_module:f",
        "./no_such_file.py:f",
        "/:f",
        "a b:c",
        "x\0y:z",
        "tokencredit:f",
    ),
    *("tokencredit.methods.outcome:group_centered", "tokencredit.methods.controls:reverse", "functools:partial"),
]


class Unprintable:
    """An object whose `repr` fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


@cache
def numbers() -> st.SearchStrategy[Any]:
    """Numbers of every size and type, also those that are no numbers."""
    sizes = [0, 1, -1, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, 10**400, float("nan"), float("inf"), float("-inf")]
    others = [True, np.float64(0.3), np.int64(2), np.float32(0.1), Decimal("0.1"), Fraction(1, 3), 1j]
    return st.one_of(st.integers(), st.floats(), st.sampled_from([*sizes, *others]))


@cache
def odd_objects() -> st.SearchStrategy[Any]:
    """Objects that no config of YAML holds, but that a caller may pass."""
    found = [None, b"grpo", bytearray(b"x"), set(), frozenset({"grpo"}), range(3), object(), int, type]
    found += [np.array(["grpo"]), np.zeros(2), torch.zeros(2), print, lambda: 0, lambda batch: batch, ..., (), ((),)]
    return st.one_of(st.sampled_from(found), st.builds(Unprintable))


@cache
def texts() -> st.SearchStrategy[str]:
    """Any text, lone surrogates included, and text that looks like credit."""
    pieces = st.sampled_from([*NAMES, *MODULES, "*", "+", "-", " ", "0.5", "1e999", ".", ":", "é", "\n", "e", "1"])
    return st.one_of(
        st.text(st.characters(codec=None)),
        st.lists(pieces, max_size=8).map("".join),
        st.lists(pieces, max_size=8).map(" ".join),
    )


@cache
def scalars() -> st.SearchStrategy[Any]:
    """One value that is neither list nor mapping."""
    return st.one_of(st.none(), st.booleans(), numbers(), texts(), odd_objects())


@cache
def nested() -> st.SearchStrategy[Any]:
    """Lists, tuples and mappings of scalars, nested in each other."""
    keys = st.one_of(texts(), st.sampled_from(PARAMETERS), st.none(), st.integers())

    def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(inner, max_size=4)
        return st.one_of(lists, lists.map(tuple), st.dictionaries(keys, inner, max_size=3))

    return st.recursive(scalars(), grow, max_leaves=6)


@cache
def hyperparameters() -> st.SearchStrategy[Any]:
    """What may stand behind the name of a step."""
    choices = st.sampled_from(["group", "batch", "all", "selected", "low", "both"])
    values = st.one_of(numbers(), choices, nested())
    return st.one_of(st.none(), st.dictionaries(st.sampled_from(PARAMETERS), values, max_size=3), scalars())


@cache
def credit_steps() -> st.SearchStrategy[Any]:
    """One step of a pipeline, most of them nearly right."""
    name = st.one_of(st.sampled_from(NAMES), st.sampled_from(MODULES))
    named = st.dictionaries(name, hyperparameters(), min_size=1, max_size=2)
    return st.one_of(name, named, st.tuples(odd_objects(), hyperparameters()), scalars())


@cache
def credit_configs() -> st.SearchStrategy[Any]:
    """Configs of a pipeline, most of them nearly right."""
    plain = st.one_of(credit_steps(), st.lists(credit_steps(), max_size=4), texts(), nested())

    def sums(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        term = st.one_of(st.fixed_dictionaries({"weight": numbers(), "credit": inner}), inner)
        return st.fixed_dictionaries({"weighted_sum": st.one_of(st.lists(term, max_size=3), inner)})

    return st.recursive(plain, sums, max_leaves=4)


ROWS, COLUMNS = 4, 3
PER_TOKEN = ("response_ids", "response_mask", "step_ids", *TOKEN_FIELDS)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)


def _plain_value(name: str, rng: torch.Generator) -> Tensor:
    shape = (ROWS, COLUMNS) if name in PER_TOKEN else (ROWS,)
    if name == "response_mask":
        return torch.rand(shape, generator=rng) < 0.8
    if name == "scored":
        return torch.rand(shape, generator=rng) < 0.7
    if name in ("response_ids", "step_ids", "group_ids"):
        return torch.randint(0, 3, shape, generator=rng)
    values = torch.rand(shape, generator=rng)
    return -values if name.endswith("logprobs") else values


@st.composite
def tensors(draw: st.DrawFn, name: str, rng: torch.Generator) -> Any:
    """A value for one field of a batch: right, or with numbers, a dtype, a shape or a type that it should not have."""
    value = _plain_value(name, rng)
    kind = draw(st.sampled_from(["plain", "plain", "numbers", "dtype", "shape", "type", "layout"]))
    if kind == "numbers" and value.is_floating_point():
        value = value.to(draw(st.sampled_from(FLOATS)))
        extremes = [float("nan"), float("inf"), 0.0, 1e-3, -1e-3, 1e30, -1e30, 3e38, 1e308, -1e308, 5e-324, -0.0, 700.0]
        size = draw(st.sampled_from(extremes))
        where = torch.rand(value.shape, generator=rng) < draw(st.sampled_from([0.2, 1.0]))
        value = torch.where(where, torch.tensor(size, dtype=torch.float64).to(value.dtype), value)
    elif kind == "dtype":
        value = value.to(draw(st.sampled_from([*FLOATS, *OTHER_DTYPES])))
    elif kind == "shape":
        value = draw(st.sampled_from([value[:0], value[:-1], value[None], value[..., :0], value.flatten()[0]]))
    elif kind == "layout":
        makers = [
            lambda v: v.to_sparse(),
            lambda v: v.to("meta"),
            lambda v: v.requires_grad_() if v.is_floating_point() else v,
        ]
        makers += [lambda v: v.expand(ROWS, *v.shape[1:]), lambda v: v.flip(0), lambda v: v.mT if v.ndim == 2 else v]
        value = draw(st.sampled_from(makers))(value)
    elif kind == "type":
        value = draw(st.one_of(st.sampled_from([value.tolist(), value.numpy(), list(value)]), scalars()))
    return value


@st.composite
def batch_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a `TokenBatch`, at most three of them odd."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    fields: dict[str, Any] = {
        name: _plain_value(name, rng)
        for name in ("response_ids", "response_mask", "rewards", "group_ids", "step_ids", *OPTIONAL_FIELDS)
        if name != "host_advantages"
    }
    names = [*fields, "scored", "host_advantages"]
    for name in draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        fields[name] = draw(tensors(name, rng))
    for name in draw(st.lists(st.sampled_from([*OPTIONAL_FIELDS, "step_ids"]), max_size=2)):
        fields.pop(name, None)
    scalar = st.one_of(st.none(), st.floats(0, 1), st.integers(0, 200), scalars())
    return fields | {"progress": draw(scalar), "step": draw(scalar)}
