"""The search file: everything that moves a number, and nothing that it does not know."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import read_yaml
from tokencredit.recipes.program.operators.table import OPERATORS
from tokencredit.recipes.search.objective import Objective
from tokencredit.settings import Count, Names, Settings, Text, Words

CONTROLS = ("best_single", "full", "random_k_tokens")
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:2605.12944: five edits of one anchor, a process on the program alone, no size control, no token floor.
    "paper": {"candidates": 5, "control": 0, "min_token_ratio": 0.0, "ranker": "ucb", "inputs": ("program",)},
    "default": {},
    "random": {"control": 0},
    "single": {"control": 0},
}


def _all_in(kind: str, accepted: Collection[str]) -> AfterValidator:
    def check(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in accepted:
                raise unknown(kind, name, accepted)
        return names

    check_names: Callable[[tuple[str, ...]], tuple[str, ...]] = check
    return AfterValidator(check_names)


class SearchSettings(Settings):
    """`search:` of a search file. Ratios are shares of the pool; `patience` counts evaluations without a new leader."""

    section: ClassVar[str] = "search"

    seed: int
    policy: Literal["default", "paper", "random", "single"] = "default"
    budget: Count = 15
    warmup: Count = 3
    control: Annotated[int, Field(ge=0, le=1), Words("0 or 1")] = 1
    candidates: Count = 48
    patience: Count = 4
    max_steps: Count = 5
    min_samples: Count = 500
    min_token_ratio: Annotated[float, Field(ge=0, le=1), Words("in [0, 1]")] = 0.08
    operators: Annotated[Names, _all_in("operator", OPERATORS)] = ("top", "top_union", "semdedup", "random_k")
    clusters: Count = 1000
    ranker: Literal["log_ei", "thompson", "ucb"] = "log_ei"
    inputs: Annotated[Names, _all_in("`search.inputs`", ("state", "program"))] = ("state",)
    anchor: Literal["seed", "incumbent"] = "seed"

    @model_validator(mode="after")
    def _check_budget(self) -> "SearchSettings":
        if self.policy in {"default", "paper"} and self.budget <= self.warmup:
            raise TokenCreditError(f"`search.budget` must exceed `search.warmup`, got {self.budget} and {self.warmup}")
        return self


class ConfirmSettings(Settings):
    """`confirm:` of a search file: seeds an arm, and the controls beside the finalists."""

    section: ClassVar[str] = "confirm"

    finalists: Count = 2
    seeds: Count = 5
    controls: Annotated[Names, _all_in("control of `confirm.controls`", CONTROLS)] = ("random_k_tokens", "best_single")
    redraw: bool = False


class LLMSettings(Settings):
    """`llm:` of a search file; samples are shown to the model only if asked for."""

    section: ClassVar[str] = "llm"

    model: Text
    roles: Annotated[Names, _all_in("role of `llm.roles`", ("propose", "rank"))] = ("propose", "rank")
    show_samples: bool = False
    timeout: Annotated[float, Field(gt=0), Words("a number above 0")] = 120.0


def _check_objective(block: Any) -> Any:
    Objective.read(block or {})
    return block or {}


class SearchConfig(Settings):
    """A whole search file. `objective` stays as it was written; `target` is what it says."""

    key_kind: ClassVar[str] = "key of a search file"

    pool: Annotated[str, Field(min_length=1), Words("the path of a pool folder")]
    evaluator: Annotated[Mapping[str, Any], Field(min_length=1)]
    search: SearchSettings
    confirm: ConfirmSettings = ConfirmSettings()
    objective: Annotated[Mapping[str, Any], BeforeValidator(_check_objective)] = {}
    llm: LLMSettings | None = None

    @property
    def target(self) -> Objective:
        """The objective as a record."""
        return Objective.read(self.objective)

    @property
    def noise_sd(self) -> float:
        """The declared standard deviation of one evaluation, in points."""
        return float(self.target.noise_sd)


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> SearchConfig:
    """A search file; `overrides` are settings of `search:` given on the command line."""
    content = read_yaml(path, "search file")
    if not isinstance(content, dict):
        raise TokenCreditError(f"{path} must be a mapping", hint="see the example in docs/recipes.md")
    return make_config(content, overrides)


def make_config(content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> SearchConfig:
    """Check a mapping and fill in the preset of its policy; unknown keys are errors that name the nearest."""
    block = content.get("search") or {}
    if isinstance(block, Mapping):
        block = dict(block) | {key: value for key, value in (overrides or {}).items() if value is not None}
        if block.get("seed") is None:
            raise TokenCreditError("a search needs a seed", hint="write `search: {seed: 1}` or pass --seed 1")
        block = PRESETS.get(str(block.get("policy", "default")), {}) | block
    return SearchConfig.read({**content, "search": block})
