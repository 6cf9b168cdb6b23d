"""What a benchmark measures: declared once, read from YAML and flags, written beside the results."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tokencredit.errors import TokenCreditError, unknown

DTYPES = ("float32", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """One benchmark: every pipeline on every task at every stage.

    * `tasks`: names of lab tasks, or `module:attribute` of your own (see docs/benchmark.md).
    * `split`, `seed`: which problems, and every other random stream.
    * `stages`: stages of the lab's model. `model`: a folder to take instead; `stages` is then ignored.
    * `prompts` × `rollouts` responses a batch, `replicates` batches on the same prompts.
    * `pipelines`: presets, estimators or expressions; empty means every preset. `controls`: add the controls.
    * `baseline`: the pipeline whose `direction` the others are compared with, paired by prompt.
    * `resamples`, `level`: of the bootstrap over prompts. `blocks`: prompts are merged into at most so many units.
    * `gain`: the rise of the mean success that the exact gradient's step would give to first order; all steps of
      `progress` have that length.
    * `sketch`: numbers kept of each prompt's gradient, for the intervals alone.
    * `teacher`: the `teacher:` section of a run (docs/teachers.md); the presets that need one then take part, and every
      method is also compared with the gradient of the teacher's objective. `teacher_samples`: responses a prompt whose
      states that gradient is taken at.
    * `memory_mib`: for gradients kept at a time; more pipelines than fit are measured in parts.
    * `progress_nodes`: prefixes on which a step is evaluated, at most.
    * `threads`: of torch; small models gain nothing from more than one, and lose much on a busy machine.
    """

    tasks: tuple[str, ...] = ("countdown",)
    stages: tuple[str, ...] = ("start",)
    model: str | None = None
    split: str = "train"
    prompts: int = 64
    rollouts: int = 16
    replicates: int = 2
    pipelines: tuple[str, ...] = ()
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
        for name in (
            "prompts",
            "replicates",
            "resamples",
            "blocks",
            "sketch",
            "teacher_samples",
            "memory_mib",
            "progress_nodes",
            "threads",
        ):
            if getattr(self, name) < 1:
                raise TokenCreditError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if self.rollouts < 2:
            raise TokenCreditError(f"`rollouts` must be at least 2, got {self.rollouts}")
        for name, high in (("level", 1.0), ("gain", math.inf)):
            if not 0.0 < getattr(self, name) < high:
                raise TokenCreditError(f"`{name}` must be in (0, {high:g}), got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if not self.tasks or not self.stages:
            raise TokenCreditError("`tasks` and `stages` need at least one name each")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "BenchConfig":
        """A config from what YAML holds; unknown keys are errors that name the nearest."""
        known = {item.name: item for item in fields(cls)}
        for key in given:
            if key not in known:
                raise unknown("key of a bench config", key, known)
        values = {key: _as_declared(key, value, getattr(_DEFAULTS, key)) for key, value in given.items()}
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """JSON-like data that `from_mapping` reads back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_DEFAULTS = BenchConfig()


def _as_declared(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        return (value,) if isinstance(value, str) else tuple(value)
    if key == "teacher" and not isinstance(value, Mapping | None):
        raise TokenCreditError(
            f"`teacher` must be a mapping, got {value!r}",
            hint="for example `teacher: {kind: model, model: path/to/checkpoint}`",
        )
    if default is None:
        return value if value is None or key == "teacher" else str(value)
    wanted = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise TokenCreditError(f"`{key}` must be of type {type(default).__name__}, got {value!r}")
    return float(value) if isinstance(default, float) else value
