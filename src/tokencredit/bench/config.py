"""What a benchmark measures: declared once, read from YAML and flags, written beside the results."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tokencredit.errors import TokenCreditError, shown, unknown

DTYPES = ("float32", "float64")
# Least and largest value of every whole number. The upper limits keep a slip of the keyboard from filling the machine.
WHOLE: dict[str, tuple[int, int]] = {
    "prompts": (1, 10**6),
    "rollouts": (2, 10**6),
    "replicates": (1, 10**4),
    "resamples": (1, 10**7),
    "blocks": (1, 10**6),
    "sketch": (1, 10**9),
    "teacher_samples": (1, 10**6),
    "memory_mib": (1, 10**9),
    "progress_nodes": (1, 10**9),
    "threads": (1, 1024),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """One benchmark: every pipeline on every task at every stage.

    * `tasks`: names of lab tasks, or `module:attribute` of your own (see docs/benchmark.md).
    * `split`, `seed`: which problems, and every other random stream.
    * `stages`: stages of the lab's model. `model`: a folder to take instead; `stages` is then ignored.
    * `chat`: whether a plain-text prompt becomes a user turn of the tokenizer's chat template. "auto" does it where the
      tokenizer has a template and the text holds none of its special tokens.
    * `prompts` × `rollouts` responses a batch, `replicates` batches on the same prompts.
    * `pipelines`: whatever `credit:` of a run takes: presets, estimators, expressions, `{preset: {hyperparameter: …}}`,
      lists of steps; empty means every preset. `controls`: add the controls.
    * `baseline`: the pipeline whose `direction` the others are compared with, paired by prompt.
    * `resamples`, `level`: of the bootstrap over prompts. `blocks`: prompts are merged into at most so many units.
    * `gain`: the rise of the mean success that the exact gradient's step would give to first order; all steps of
      `progress` have that length.
    * `sketch`: numbers kept of each prompt's gradient, for the intervals alone.
    * `teacher`: the `teacher:` section of a run (docs/teachers.md); the presets that need one then take part, and every
      method is also compared with the gradient of the teacher's objective. `teacher_samples`: responses a prompt whose
      states that gradient is taken at.
    * `memory_mib`: decides how many pipelines are measured at a time, from the size of their gradients and sketches.
      It is not a bound on the process: the model, the exact gradients and the gradients of the prompts in flight come
      on top, and one pipeline is always taken.
    * `progress_nodes`: prefixes on which a step is evaluated, at most.
    * `threads`: of torch; small models gain nothing from more than one, and lose much on a busy machine.
    """

    tasks: tuple[str, ...] = ("countdown",)
    stages: tuple[str, ...] = ("start",)
    model: str | None = None
    chat: bool | str = "auto"
    split: str = "train"
    prompts: int = 64
    rollouts: int = 16
    replicates: int = 2
    pipelines: tuple[Any, ...] = ()
    controls: bool = True
    baseline: str = "grpo"
    seed: int = 0
    dtype: str = "float32"
    resamples: int = 1000
    level: float = 0.95
    blocks: int = 64
    gain: float = 0.02
    sketch: int = 4096
    teacher: Mapping[str, Any] | None = None
    teacher_samples: int = 256
    memory_mib: int = 768
    progress_nodes: int = 8192
    threads: int = 1

    def __post_init__(self) -> None:
        for name, (low, high) in WHOLE.items():
            value = getattr(self, name)
            if value < low:
                raise TokenCreditError(f"`{name}` must be at least {low}, got {value}")
            if value > high:
                raise TokenCreditError(f"`{name}` must be at most {high}, got {shown(value)}")
        for name, limit in (("level", 1.0), ("gain", math.inf)):
            if not 0.0 < getattr(self, name) < limit:
                raise TokenCreditError(f"`{name}` must be in (0, {limit:g}), got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.chat not in (True, False, "auto"):
            raise TokenCreditError(f"`chat` must be true, false or auto, got {self.chat!r}")
        if not self.tasks or not self.stages:
            raise TokenCreditError("`tasks` and `stages` need at least one name each")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "BenchConfig":
        """A config from what YAML holds; unknown keys are errors that name the nearest, and so are wrong types."""
        known = {item.name: item for item in fields(cls)}
        for key in given:
            if key not in known:
                raise unknown("key of a bench config", key, known)
        for key, value in given.items():
            _check_plain(key, value)
        return cls(**{key: (READERS.get(key) or _default_reader(key))(key, value) for key, value in given.items()})

    def to_mapping(self) -> dict[str, Any]:
        """JSON-like data that `from_mapping` reads back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_DEFAULTS = BenchConfig()

Reader = Callable[[str, Any], Any]


def _check_plain(key: str, value: Any) -> None:
    """Refuse what only YAML can hold, such as a set: results are written as JSON."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenCreditError(f"`{key}` holds a value that JSON cannot hold, got {shown(value)}") from error


def _default_reader(key: str) -> Reader:
    """The reader of a key whose type is that of its default."""
    default = getattr(_DEFAULTS, key)
    return {bool: _read_bool, int: _read_int, float: _read_float, str: _read_text}[type(default)]


def _read_bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def _read_int(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(key, "of type int", value)
    return value


def _read_float(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(key, "of type float", value)
    try:
        return float(value)
    except OverflowError as error:
        raise _wrong(key, "a number of ordinary size", value) from error


def _read_text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(key, "a text", value)
    return value


def _read_optional_text(key: str, value: Any) -> str | None:
    return None if value is None else _read_text(key, value)


def _read_names(key: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise _wrong(key, "a name or a list of names", value)
    return tuple(names)


def _read_pipelines(key: str, value: Any) -> tuple[Any, ...]:
    """A name alone is one pipeline; a list holds one item per pipeline, and an item may be a list of steps itself."""
    if isinstance(value, str | Mapping):
        value = (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str | Mapping | list) for item in value):
        raise TokenCreditError(
            f"`{key}` is a list with one item per pipeline, got {shown(value)}",
            hint="an item is what `credit:` of a run takes, such as hapo, {hapo: {alpha: 0.5}} or [hapo, my:function]",
        )
    return tuple(value)


def _read_chat(key: str, value: Any) -> bool | str:
    if not isinstance(value, bool | str):
        raise _wrong(key, "true, false or auto", value)
    return value


def _read_teacher(key: str, value: Any) -> Mapping[str, Any] | None:
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        raise TokenCreditError(
            f"`{key}` must be a mapping, got {shown(value)}",
            hint="for example `teacher: {kind: model, model: path/to/checkpoint}`",
        )
    return value


READERS: dict[str, Reader] = {
    "tasks": _read_names,
    "stages": _read_names,
    "model": _read_optional_text,
    "pipelines": _read_pipelines,
    "chat": _read_chat,
    "teacher": _read_teacher,
}


def _wrong(key: str, expected: str, value: Any) -> TokenCreditError:
    return TokenCreditError(f"`{key}` must be {expected}, got {shown(value)}")
