"""The search file: everything that moves a number, and nothing that it does not know."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError, unknown
from tokencredit.files import read_yaml

OPERATORS = ("top", "top_union", "semdedup", "random_k")
CONTROLS = ("best_single", "full", "random_k_tokens")
PRESETS: dict[str, dict[str, Any]] = {
    # arXiv:2605.12944: five edits of one anchor, a process on the program alone, no size control, no token floor.
    "paper": {"candidates": 5, "control": 0, "min_token_ratio": 0.0, "ranker": "ucb", "inputs": ("program",)},
    "default": {},
    "random": {"control": 0},
    "single": {"control": 0},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """`search:` of a search file. Ratios are shares of the pool; `patience` counts evaluations without a new leader."""

    seed: int
    policy: str = "default"
    budget: int = 15
    warmup: int = 3
    control: int = 1
    candidates: int = 48
    patience: int = 4
    max_steps: int = 5
    min_samples: int = 500
    min_token_ratio: float = 0.08
    operators: tuple[str, ...] = OPERATORS
    clusters: int = 1000
    ranker: str = "log_ei"
    inputs: tuple[str, ...] = ("state",)
    anchor: str = "seed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmSettings:
    """`confirm:` of a search file: seeds an arm, and the controls beside the finalists."""

    finalists: int = 2
    seeds: int = 5
    controls: tuple[str, ...] = ("random_k_tokens", "best_single")
    redraw: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMSettings:
    """`llm:` of a search file; samples are shown to the model only if asked for."""

    model: str
    roles: tuple[str, ...] = ("propose", "rank")
    show_samples: bool = False
    timeout: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """A whole search file, resolved."""

    pool: str
    evaluator: Mapping[str, Any]
    search: SearchSettings
    confirm: ConfirmSettings = field(default_factory=ConfirmSettings)
    objective: Mapping[str, Any] = field(default_factory=dict)
    llm: LLMSettings | None = None

    @property
    def noise_sd(self) -> float:
        return float(self.objective.get("noise_sd", 0.5))


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> SearchConfig:
    """A search file; `overrides` are settings of `search:` given on the command line."""
    content = read_yaml(path, "search file")
    if not isinstance(content, dict):
        raise TokenCreditError(f"{path} must be a mapping", hint="see the example in docs/recipes.md")
    return make_config(content, overrides)


def make_config(content: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> SearchConfig:
    """Validate a mapping; unknown keys are errors that name the nearest."""
    blocks = ("evaluator", "objective", "search", "confirm", "llm")
    for key in content:
        if key not in ("pool", *blocks):
            raise unknown("key of a search file", key, ("pool", *blocks))
    for key in ("pool", "evaluator"):
        if not content.get(key):
            raise TokenCreditError(f"the search file needs `{key}`")
    for key in blocks:
        block = content.get(key)
        if block and not (isinstance(block, Mapping) and all(isinstance(name, str) for name in block)):
            raise TokenCreditError(f"`{key}` of the search file must be a mapping, got {block!r}")
    if not isinstance(content["pool"], str):
        raise TokenCreditError(f"`pool` must be the path of a pool folder, got {content['pool']!r}")
    objective = _checked_objective(content.get("objective") or {})
    block = dict(content.get("search") or {}) | {k: v for k, v in (overrides or {}).items() if v is not None}
    if block.get("seed") is None:
        raise TokenCreditError("a search needs a seed", hint="write `search: {seed: 1}` or pass --seed 1")
    block = PRESETS.get(str(block.get("policy", "default")), {}) | block
    settings = _record(SearchSettings, "search", block)
    _check_settings(settings)
    confirm = _record(ConfirmSettings, "confirm", content.get("confirm") or {})
    _check_confirm(confirm)
    return SearchConfig(
        pool=str(content["pool"]),
        evaluator=dict(content["evaluator"]),
        search=settings,
        confirm=confirm,
        objective=objective,
        llm=_record(LLMSettings, "llm", content["llm"]) if content.get("llm") else None,
    )


def _checked_objective(block: Mapping[str, Any]) -> dict[str, Any]:
    from tokencredit.recipes.search.objective import make_objective

    for key in block:
        if key not in {"tasks", "noise_sd", "scale"}:
            raise unknown("key of `objective`", key, ("tasks", "noise_sd", "scale"))
    for key in ("noise_sd", "scale"):
        value = block.get(key, 1.0)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1e12 or (key == "scale" and value == 0):
            raise TokenCreditError(f"`objective.{key}` must be a number above 0, got {value!r}")
    make_objective(block)
    return dict(block)


def _record(kind: type, where: str, block: Mapping[str, Any]) -> Any:
    known = {entry.name: entry for entry in fields(kind)}
    for key in block:
        if key not in known:
            raise unknown(f"key of `{where}`", key, known)
    made: dict[str, Any] = {}
    for key, value in block.items():
        default = known[key].default
        if isinstance(default, tuple):
            if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                raise TokenCreditError(f"`{where}.{key}` must be a list of names, got {value!r}")
            made[key] = tuple(value)
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            made[key] = float(value)
        elif isinstance(default, int | float | str) and type(value) is not type(default):
            raise TokenCreditError(f"`{where}.{key}` must be like {default!r}, got {value!r}")
        else:
            made[key] = value
    for key, entry in known.items():
        if entry.default is MISSING and key not in made:
            raise TokenCreditError(f"`{where}` needs `{key}`")
    return kind(**made)


def _check_confirm(settings: ConfirmSettings) -> None:
    for control in settings.controls:
        if control not in CONTROLS:
            raise unknown("control of `confirm.controls`", control, CONTROLS)
    for name in ("finalists", "seeds"):
        if getattr(settings, name) < 1:
            raise TokenCreditError(f"`confirm.{name}` must be at least 1, got {getattr(settings, name)}")


def _check_settings(settings: SearchSettings) -> None:
    from tokencredit.recipes.program.operators import OPERATORS as table

    if settings.policy not in PRESETS:
        raise unknown("policy", settings.policy, PRESETS)
    for op in settings.operators:
        if op not in table:
            raise unknown("operator", op, table)
    for name, accepted in (("ranker", ("log_ei", "thompson", "ucb")), ("anchor", ("seed", "incumbent"))):
        if getattr(settings, name) not in accepted:
            raise unknown(f"`search.{name}`", getattr(settings, name), accepted)
    if unused := set(settings.inputs) - {"state", "program"}:
        raise unknown("`search.inputs`", sorted(unused)[0], ("state", "program"))
    if type(settings.seed) is not int:
        raise TokenCreditError(f"`search.seed` must be a whole number, got {settings.seed!r}")
    for name in ("budget", "warmup", "candidates", "patience", "max_steps", "min_samples"):
        if getattr(settings, name) < 1:
            raise TokenCreditError(f"`search.{name}` must be at least 1, got {getattr(settings, name)}")
    if not 0 <= settings.min_token_ratio <= 1:
        raise TokenCreditError(f"`search.min_token_ratio` must be in [0, 1], got {settings.min_token_ratio}")
    if settings.control not in {0, 1}:
        raise TokenCreditError(f"`search.control` must be 0 or 1, got {settings.control}")
    if settings.policy in {"default", "paper"} and settings.budget <= settings.warmup:
        raise TokenCreditError(
            f"`search.budget` must exceed `search.warmup`, got {settings.budget} and {settings.warmup}"
        )
