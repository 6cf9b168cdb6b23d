"""What a benchmark measures: declared once, read from YAML and flags, written beside the results."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from tokencredit.errors import TokenCreditError, shown
from tokencredit.settings import Names, Settings, Text, Words, plain_value


def _as_pipelines(value: Any) -> Any:
    """A name alone is one pipeline; a list holds one item per pipeline, and an item may be a list of steps itself."""
    items = (value,) if isinstance(value, str | Mapping) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | Mapping | list) for item in items):
        raise TokenCreditError(
            f"`pipelines` is a list with one item per pipeline, got {shown(value)}",
            hint="an item is what `credit:` of a run takes, such as hapo, {hapo: {alpha: 0.5}} or [hapo, my:function]",
        )
    return tuple(items)


def _check_teacher(value: Any) -> Any:
    if value is not None and not isinstance(value, Mapping):
        raise TokenCreditError(
            f"`teacher` must be a mapping, got {shown(value)}",
            hint="for example `teacher: {kind: model, model: path/to/checkpoint}`",
        )
    return value


# The upper limits keep a slip of the keyboard from filling the machine.
Few = Annotated[int, Field(ge=1, le=10**4)]
Many = Annotated[int, Field(ge=1, le=10**6)]
Huge = Annotated[int, Field(ge=1, le=10**9)]


class BenchConfig(Settings):
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
    * `device`: where the model samples, scores and differentiates: `cpu`, `cuda` or `cuda:1`.
    * `resamples`, `level`: of the bootstrap over prompts. `blocks`: prompts are merged into at most so many units.
    * `gain`: the rise of the mean success that the exact gradient's step would give to first order; all steps of
      `progress` have that length.
    * `sketch`: numbers kept of each prompt's gradient, for the intervals alone.
    * `teacher`: the `teacher:` section of a run (docs/teachers.md); the presets that need one then take part, and every
      method is also compared with the gradient of the teacher's objective. `teacher_samples`: responses a prompt whose
      states that gradient is taken at.
    * `memory_mib`: bound on what the gradients take on the device: their sums and sketches, the exact ones, and the
      gradients and activations of the prompts in flight. It decides how many pipelines are measured at a time and how
      many vectors one backward pass takes; the figures do not depend on it. The model comes on top.
    * `progress_nodes`: prefixes on which a step is evaluated, at most.
    * `threads`: of torch; small models gain nothing from more than one, and lose much on a busy machine.
    """

    key_kind: ClassVar[str] = "key of a bench config"

    tasks: Annotated[Names, Field(min_length=1)] = ("countdown",)
    stages: Annotated[Names, Field(min_length=1)] = ("start",)
    model: Text | None = None
    chat: Annotated[bool | Literal["auto"], Words("true, false or auto")] = "auto"
    split: Text = "train"
    prompts: Many = 64
    rollouts: Annotated[int, Field(ge=2, le=10**6)] = 16
    replicates: Few = 2
    pipelines: Annotated[tuple[Any, ...], BeforeValidator(_as_pipelines)] = ()
    controls: bool = True
    baseline: Text = "grpo"
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    device: Text = "cpu"
    resamples: Annotated[int, Field(ge=1, le=10**7)] = 1000
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    blocks: Many = 64
    gain: Annotated[float, Field(gt=0)] = 0.02
    sketch: Huge = 4096
    teacher: Annotated[Mapping[str, Any] | None, BeforeValidator(_check_teacher)] = None
    teacher_samples: Many = 256
    memory_mib: Huge = 1536
    progress_nodes: Huge = 8192
    threads: Annotated[int, Field(ge=1, le=1024)] = 1

    @classmethod
    def read(cls, given: Any) -> "BenchConfig":
        """Read what YAML holds; unknown keys, wrong types and what JSON cannot hold are errors of one line."""
        return super().read(plain_value(given))
