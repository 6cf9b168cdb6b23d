"""The config of a run as one frozen record: read once, then passed to everything that a run does."""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tokencredit.collect.table import resolve_options
from tokencredit.collect.teacher.build import resolve_teacher
from tokencredit.collect.teacher.prompts import PromptRenderer
from tokencredit.errors import TokenCreditError, shown, unknown
from tokencredit.lab.tasks import TASKS
from tokencredit.pipeline.labels import label_of
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.runs.config.rewards import Reward, parse_rewards
from tokencredit.runs.config.trainer_fields import (
    check_fields,
    default_fields,
    guess_field,
    is_lab_model,
    move_to_config,
)
from tokencredit.settings import LARGEST, Block, Count, Number, Seed, Settings, Text, Words, plain_value

MOST_PROMPTS = 1_000_000  # drawn from a lab task before a run starts: about 3 ms each
MOST_THREADS = 1024


class DatasetSettings(Settings):
    """`dataset:`, the prompts of a run; see docs/configs.md."""

    section: ClassVar[str] = "dataset"

    path: Text | None = None
    config: Text | None = None
    """A configuration of a data set on the hub, such as "main" of openai/gsm8k; `name` is accepted too."""
    split: Text = "train"
    prompt: Text = "prompt"
    count: Count | None = None
    evaluation: Text | None = None
    """A path; None with `evaluation_split` means another split of `path`."""
    evaluation_split: Text | None = None
    system_prompt: Text | None = None
    chat: Literal["auto"] | bool = "auto"

    @classmethod
    def read(cls, given: Any) -> "DatasetSettings":
        """Read the section; `name` stands for `config`."""
        if isinstance(given, Mapping) and "name" in given:
            given = dict(given)
            name = given.pop("name")
            if given.setdefault("config", name) != name:
                raise TokenCreditError(f"`dataset.name` is {shown(name)} and `dataset.config` {shown(given['config'])}")
        return super().read(given)


class EvaluationSettings(Settings):
    """`evaluation:`, when and how a run is evaluated."""

    section: ClassVar[str] = "evaluation"

    every: Count = 20
    problems: Count = 100
    samples: Count = 8
    threshold: Number = 0.0


class RecordSettings(Settings):
    """`records:`, how often the batch and its credit are stored."""

    section: ClassVar[str] = "records"

    every: Annotated[int, Field(ge=0, le=LARGEST), Words("a whole number of steps, 0 for no records")] = 5


class RunConfig(Settings):
    """The config of one run, checked and with every default filled in.

    `load_config` makes one of a YAML file. `pipeline`, `rewards`, `teacher_prompts` and `collector_functions` are what
    `credit`, `reward`, `teacher` and `collectors` mean; they are parsed once, when the record is made.
    """

    name: Text = "run"
    task: Text | None = None
    model: Text = "tiny"
    stage: Text = "start"
    credit: Any = "grpo"
    timing: Literal["auto", "update", "rollout"] = "auto"
    seed: Seed = 0
    steps: Count = 60
    prompts_per_step: Annotated[Count | None, Field(validate_default=True)] = None
    sampler: Literal["auto", "fast", "host"] = "auto"
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = Field(None, validate_default=True)
    dataset: DatasetSettings = DatasetSettings()
    reward: Any = None
    lora: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    collectors: Block = Field({})
    evaluation: EvaluationSettings = EvaluationSettings()
    records: RecordSettings = RecordSettings()
    trainer: Block = Field({}, validate_default=True)

    @classmethod
    def read(cls, given: Any) -> "RunConfig":
        """Read a mapping as YAML holds it. `trainer.max_steps` stands for `steps`, and `trainer.seed` for `seed`."""
        if isinstance(given, cls):
            return given
        return super().read(move_to_config(plain_value(given)))

    @classmethod
    def unknown_key(cls, key: object) -> TokenCreditError:
        """The error for an unknown key, with the section or the field of the trainer that it probably means."""
        error = super().unknown_key(key)
        sections = [name for name, kind in cls.sections().items() if key in kind.model_fields]
        hint = f"`{sections[0]}.{key}`" if sections else guess_field(str(key))
        return TokenCreditError(error.message, hint=f"write {hint}") if hint else error

    @property
    def is_lab(self) -> bool:
        """Whether the lab builds the model."""
        return is_lab_model(self.model)

    @property
    def source(self) -> str:
        """Where the prompts come from: a task of the lab, or the path of a data set."""
        return self.task or str(self.dataset.path)

    @property
    def label(self) -> str:
        """The name of the credit in tables, plots and folders."""
        return label_of(self.credit)

    @cached_property
    def pipeline(self) -> Pipeline:
        """What `credit` means."""
        return Pipeline.parse(self.credit)

    @cached_property
    def rewards(self) -> tuple[Reward, ...]:
        """What `reward` means."""
        return parse_rewards(self.reward)

    @property
    def learns_from_reward(self) -> bool:
        """False where the pipeline learns only from a teacher: a reward is then logged and nothing else."""
        return any(not chain.estimator.spec.ignores_reward for chain in self.pipeline.chains)

    @cached_property
    def teacher_prompts(self) -> PromptRenderer | None:
        """The prompts of the teacher that `teacher` describes."""
        if self.teacher is None:
            return None
        section = dict(self.teacher)
        if not isinstance(section.get("kind"), str):
            raise TokenCreditError(f"`teacher` needs a `kind`, got {shown(section)}", hint="see docs/teachers.md")
        if is_lab_model(section.get("model")):
            section.pop("stage", None)  # `lab.teachers.with_lab_model` reads it
        return PromptRenderer(resolve_teacher(section))

    @cached_property
    def collector_functions(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """What `collectors` means: options of the built-in ones, and functions that replace one."""
        return resolve_options(self.collectors)

    @field_validator("prompts_per_step")
    @classmethod
    def _fill_in_prompts(cls, value: int | None, info: Any) -> int:
        lab = is_lab_model(info.data.get("model"))
        return value or (32 if lab else 8)  # 8 prompts × TRL's 8 generations are 64 rows

    @field_validator("threads")
    @classmethod
    def _fill_in_threads(cls, value: int | None, info: Any) -> int | None:
        """A lab model gains nothing from more than one thread; elsewhere null lets torch decide."""
        return 1 if value is None and is_lab_model(info.data.get("model")) else value

    @field_validator("trainer")
    @classmethod
    def _fill_in_trainer(cls, trainer: dict[str, Any], info: Any) -> dict[str, Any]:
        check_fields(trainer)
        settings = info.data
        lab = is_lab_model(settings.get("model"))
        lora, task = settings.get("lora") is not None, settings.get("task") is not None
        return default_fields(lab=lab, lora=lora, task=task) | trainer

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        for parsed in ("pipeline", "rewards", "teacher_prompts", "collector_functions"):
            getattr(self, parsed)  # their errors belong to the reading of the config
        _check_source(self)
        _check_reward_weights(self)
        return self


def _check_source(config: RunConfig) -> None:
    task, path = config.task, config.dataset.path
    if task is None and path is None:
        raise TokenCreditError(
            "a config needs `task` or `dataset.path`",
            hint=f"`task: {sorted(TASKS)[0]}`, or `dataset: {{path: …}}` with `reward: module:function`",
        )
    if task is not None and task not in TASKS:
        raise unknown("task", task, TASKS)
    for name, value in (("dataset.path", path), ("reward", config.reward)):
        if task is not None and value is not None:
            raise TokenCreditError(
                f"`task: {task}` brings its own prompts and reward, and `{name}` is {shown(value)}",
                hint="leave out one of them",
            )
    if task is None and config.reward is None and config.learns_from_reward:
        raise TokenCreditError("`dataset` needs `reward`", hint="`reward: module:function`, a TRL reward function")
    if task is None and config.is_lab:
        raise TokenCreditError(f"`dataset` needs `model`: a folder or a model name, got {config.model!r}")
    prompts = config.steps * int(config.prompts_per_step or 1)
    if task is not None and config.dataset.count is None and prompts > MOST_PROMPTS:
        raise TokenCreditError(
            f"{config.steps} steps × {config.prompts_per_step} prompts are {prompts:,} problems to draw before "
            f"the first step; at most {MOST_PROMPTS:,}",
            hint="set dataset.count, for example --set dataset.count=10000: the problems then repeat",
        )


def _check_reward_weights(config: RunConfig) -> None:
    weights, given = [reward.weight for reward in config.rewards], config.trainer.get("reward_weights")
    if given is None or not weights:
        return
    if not isinstance(given, list) or len(given) != len(weights):
        raise TokenCreditError(
            f"`trainer.reward_weights` must be a list of {len(weights)} numbers, one per reward, got {shown(given)}"
        )
    if any(weight != 1 for weight in weights) and given != weights:
        raise TokenCreditError(
            f"`reward` and `trainer.reward_weights` give different weights: {weights} and {shown(given)}",
            hint="leave out trainer.reward_weights",
        )
