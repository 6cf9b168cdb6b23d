"""Options of the collectors that run inside a host: names, defaults, what is accepted; refused before a model loads."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from tokencredit.batch.records import OPTIONAL_FIELDS
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.pipeline.plugins import load_attribute

SHARED = frozenset({"attention_entropies", "adapter_residuals"})  # fields that a pass of the host can give
LAYERS = ("last_postnorm", "last_prenorm", "last_prenorm_relative", "mean_all")

# Defaults by field. Fields that one pass fills together share the options of the first.
OPTIONS: dict[str, dict[str, Any]] = {
    "attention_entropies": {
        "layer": None,
        "heads": "mean_rows",
        "row": "predicting",
        "drop_sink": 0,
        "context": "visible",
    },
    "adapter_residuals": {"layer": "last_postnorm"},
    "doubling_ratios": {"rows": 16},
    "attention_distances": {"layers": None, "share": 0.3},
    "importances": {"after": None, "tail": 4, "layer": None},
}
SAME = {"attention_influences": "attention_distances"}

CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("attention_entropies", "heads"): ("mean_rows", "mean_entropy"),
    ("attention_entropies", "row"): ("predicting", "own"),
    ("attention_entropies", "context"): ("visible", "total"),
    ("adapter_residuals", "layer"): LAYERS,
}


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_layers(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) > 0 and all(_is_count(x, 0) for x in value))


# What each remaining option accepts, in words and as a test.
ACCEPTED: dict[tuple[str, str], tuple[str, Callable[[Any], bool]]] = {
    ("attention_entropies", "layer"): (
        "a layer index, a list of them, or null for the middle layer",
        lambda value: _is_count(value, 0) or _is_layers(value),
    ),
    ("attention_entropies", "drop_sink"): ("a whole number of keys", lambda value: _is_count(value, 0)),
    ("doubling_ratios", "rows"): ("a whole number of responses of at least 1", lambda value: _is_count(value, 1)),
    ("attention_distances", "layers"): ("a list of layer indices, or null for five in the middle", _is_layers),
    ("attention_distances", "share"): (
        "a number in (0, 0.5]",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 0.5,
    ),
    ("importances", "after"): (
        "a text, or null",
        lambda value: value is None or (isinstance(value, str) and value != ""),
    ),
    ("importances", "tail"): ("a whole number of tokens of at least 1", lambda value: _is_count(value, 1)),
    ("importances", "layer"): (
        "a layer index, or null for the last one",
        lambda value: value is None or _is_count(value, 0),
    ),
}


def resolve_options(given: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Options of our collectors by field, defaults filled in, and the functions that take a collector's place.

    An entry of `given` is a mapping of options, a function, or its name `module:function`.
    """
    if not isinstance(given, Mapping):
        raise TokenCreditError(
            f"`collectors` must be a mapping from a field to options or a function, got {given!r}",
            hint="for example collectors={'attention_entropies': {'layer': 4}}",
        )
    options, functions = copy.deepcopy(OPTIONS), {}
    for name, value in given.items():
        if name not in OPTIONAL_FIELDS:
            raise unknown("field of a collector", name, OPTIONAL_FIELDS)
        if isinstance(value, Mapping):
            owner = _owner(name)
            options[owner] |= {key: _checked(owner, key, option) for key, option in value.items()}
        elif isinstance(value, str):
            functions[name] = _function(name, load_attribute(value, f"the collector of {name}"))
        else:
            functions[name] = _function(name, value)
    return options, functions


def _owner(name: str) -> str:
    owner = SAME.get(name, name)
    if owner not in OPTIONS:
        raise TokenCreditError(
            f"the collector of `{name}` has no options",
            hint=f"options have: {', '.join([*OPTIONS, *SAME])}; elsewhere name a function of yours, module:function",
        )
    return owner


def _checked(field: str, key: str, value: Any) -> Any:
    if key not in OPTIONS[field]:
        raise unknown(f"option of the collector of `{field}`", key, OPTIONS[field])
    if (field, key) in CHOICES:
        if value not in CHOICES[field, key]:
            raise unknown(f"`{key}` of the collector of `{field}`", value, CHOICES[field, key])
        return value
    words, test = ACCEPTED[field, key]
    if not test(value):
        raise TokenCreditError(f"`{key}` of the collector of `{field}` must be {words}, got {value!r}")
    return value


def _function(name: str, value: Any) -> Any:
    if not callable(value):
        raise TokenCreditError(
            f"the collector of `{name}` must be a function, its name, or a mapping of options, got {value!r}"
        )
    return value
