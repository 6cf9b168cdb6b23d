"""The table of collectors: by what, where and with which options each optional field of a batch is filled.

What fills a field is also named in the error of a batch without it: `batch.records.COLLECTORS`, one sentence per field,
because batches are below this package and know of no function here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokencredit.batch.records import OPTIONAL_FIELDS
from tokencredit.errors import TokenCreditError, unknown
from tokencredit.pipeline.plugins import load_attribute

Needs = Literal["adapter", "teacher", "local teacher", "list of answers"]
# The host's own numbers; read off a pass that the host runs anyway, where that is exact; a pass of the collector's.
Source = Literal["host", "tapped", "pass"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of a collector: its default, what it accepts in words, and the test of it."""

    default: Any
    words: str = ""
    test: Callable[[Any], bool] = callable
    choices: tuple[str, ...] = ()

    @property
    def accepted(self) -> str:
        return self.words or ", ".join(f"`{choice}`" for choice in self.choices)

    def check(self, name: str, value: Any) -> Any:
        """The value, or an error that names what is accepted."""
        if self.choices and value not in self.choices:
            raise unknown(name, value, self.choices)
        if not self.choices and not self.test(value):
            raise TokenCreditError(f"{name} must be {self.words}, got {value!r}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """How one field is filled.

    * `function`: `module:function`, which takes a `Rollout` and the options; imported where it is used. Fields with the
      same function are filled by one call, each with its `output` of the tuple. None: nothing here, only the host.
    * `borrows`: options that are those of another field. `needs`: without it there is no such collector.
    * `text_only`: runs a pass on token ids, outside a host's wrappers: refuses images and sharded parameters.
    * `trl`, `verl`: where the host has the field from; None: it does not have it.
    """

    function: str | None = None
    output: int | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    borrows: Mapping[str, str] = field(default_factory=dict)
    needs: Needs | None = None
    text_only: bool = False
    trl: Source | None = None
    verl: Source | None = None


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_layers(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and len(value) > 0 and all(_is_count(x, 0) for x in value))


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 0.5


ENTROPY_OPTIONS = {
    "layer": Option(
        default=None,
        words="a layer index, a list of them, or null for the middle layer",
        test=lambda value: _is_count(value, 0) or _is_layers(value),
    ),
    "heads": Option(default="mean_rows", choices=("mean_rows", "mean_entropy")),
    "row": Option(default="predicting", choices=("predicting", "own")),
    "drop_sink": Option(default=0, words="a whole number of keys", test=lambda value: _is_count(value, 0)),
    "context": Option(default="visible", choices=("visible", "total")),
}
RHYTHM_OPTIONS = {
    "layers": Option(default=None, words="a list of layer indices, or null for five in the middle", test=_is_layers),
    "share": Option(default=0.3, words="a number in (0, 0.5]", test=_is_share),
}
LAYER = Option(default="last_postnorm", choices=("last_postnorm", "last_prenorm", "last_prenorm_relative", "mean_all"))
ROWS = Option(default=16, words="a whole number of responses of at least 1", test=lambda value: _is_count(value, 1))
ANSWER_OPTIONS = {
    "after": Option(
        default=None,
        words="a text, or null",
        test=lambda value: value is None or (isinstance(value, str) and value != ""),
    ),
    "tail": Option(default=4, words="a whole number of tokens of at least 1", test=lambda value: _is_count(value, 1)),
    "layer": Option(
        default=None,
        words="a layer index, or null for the last one",
        test=lambda value: value is None or _is_count(value, 0),
    ),
}
PASSES = "tokencredit.collect.collectors"
TEACHERS = "tokencredit.collect.teacher.collect:teacher_scores"
RHYTHMS = f"{PASSES}:attention_rhythms_of"

TABLE: dict[str, Collector] = {
    "entropies": Collector(trl="host", verl="host"),
    "old_logprobs": Collector(trl="host", verl="host"),
    "current_logprobs": Collector(trl="host", verl="host"),
    "rollout_logprobs": Collector(trl="host", verl="host"),
    "ref_logprobs": Collector(function=f"{PASSES}:reference_logprobs_of", needs="adapter", trl="host", verl="host"),
    "host_advantages": Collector(trl="host", verl="host"),
    "step": Collector(trl="host", verl="host"),
    "teacher_logprobs": Collector(function=TEACHERS, output=0, needs="teacher", trl="pass", verl="host"),
    "teacher_entropies": Collector(function=TEACHERS, output=1, needs="local teacher", trl="pass"),
    "attention_entropies": Collector(
        function=f"{PASSES}:attention_entropies_of",
        options=ENTROPY_OPTIONS,
        text_only=True,
        trl="tapped",
        verl="tapped",
    ),
    "attention_distances": Collector(function=RHYTHMS, output=0, options=RHYTHM_OPTIONS, text_only=True, trl="pass"),
    "attention_influences": Collector(function=RHYTHMS, output=1, options=RHYTHM_OPTIONS, text_only=True, trl="pass"),
    "importances": Collector(function=f"{PASSES}:importances_of", options=ANSWER_OPTIONS, text_only=True, trl="pass"),
    "adapter_residuals": Collector(
        function=f"{PASSES}:adapter_residuals_of",
        options={"layer": LAYER},
        needs="adapter",
        text_only=True,
        trl="tapped",
        verl="tapped",
    ),
    "doubling_ratios": Collector(
        function=f"{PASSES}:doubling_ratios_of",
        options={"rows": ROWS},
        borrows={"layer": "adapter_residuals"},
        needs="adapter",
        text_only=True,
        trl="pass",
    ),
    "values": Collector(needs="list of answers", trl="pass"),
}


def fields_of(**wanted: Any) -> frozenset[str]:
    """Fields whose rows have these entries: `fields_of(trl="host")`, `fields_of(needs="adapter")`."""
    return frozenset(
        name for name, row in TABLE.items() if all(getattr(row, key) == value for key, value in wanted.items())
    )


def resolve_options(sections: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Options of our collectors by field, defaults filled in, and the functions that take a collector's place.

    An entry of `sections` is a mapping of options, a function, or its name `module:function`.
    """
    if not isinstance(sections, Mapping):
        raise TokenCreditError(
            f"`collectors` must be a mapping from a field to options or a function, got {sections!r}",
            hint="for example collectors={'attention_entropies': {'layer': 4}}",
        )
    options = {name: {key: one.default for key, one in row.options.items()} for name, row in TABLE.items()}
    functions = {}
    for name, value in sections.items():
        if name not in OPTIONAL_FIELDS:
            raise unknown("field of a collector", name, OPTIONAL_FIELDS)
        if isinstance(value, Mapping):
            changed = {key: _check_option(name, key, option) for key, option in value.items()}
            for other in _filled_together(name):
                options[other] |= changed
        elif isinstance(value, str):
            functions[name] = _check_function(name, load_attribute(value, f"the collector of {name}"))
        else:
            functions[name] = _check_function(name, value)
    for name, row in TABLE.items():
        options[name] |= {key: options[other][key] for key, other in row.borrows.items()}
    return options, functions


def _filled_together(name: str) -> list[str]:
    """The fields that one call fills, this one among them: they share their options."""
    return [other for other, row in TABLE.items() if other == name or row.function == TABLE[name].function is not None]


def _check_option(name: str, key: str, value: Any) -> Any:
    options = TABLE[name].options
    if not options:
        having = [other for other, row in TABLE.items() if row.options]
        raise TokenCreditError(
            f"the collector of `{name}` has no options",
            hint=f"options have: {', '.join(having)}; elsewhere name a function of yours, module:function",
        )
    if key not in options:
        raise unknown(f"option of the collector of `{name}`", key, options)
    return options[key].check(f"`{key}` of the collector of `{name}`", value)


def _check_function(name: str, value: Any) -> Any:
    if not callable(value):
        raise TokenCreditError(
            f"the collector of `{name}` must be a function, its name, or a mapping of options, got {value!r}"
        )
    return value
