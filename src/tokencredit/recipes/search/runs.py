"""Run folders: the resolved configuration beside the history, and a search opened from either."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokencredit.errors import TokenCreditError
from tokencredit.files import dump_yaml, make_folder, read_text, write_text
from tokencredit.recipes.evaluate.history import load_history
from tokencredit.recipes.evaluate.table import make_evaluator
from tokencredit.recipes.search.config import SearchConfig, load_config
from tokencredit.recipes.search.llm import Adviser
from tokencredit.recipes.search.loop import Search
from tokencredit.recipes.search.policies import warm_up
from tokencredit.recipes.signals.store import load_materials

CONFIG = "search.yaml"


def as_yaml(config: SearchConfig) -> str:
    """The resolved configuration as the text of a search file."""
    return dump_yaml({key: value for key, value in config.to_mapping().items() if value is not None})


def save_config(config: SearchConfig, folder: Path) -> None:
    """Write the resolved configuration; a folder with evaluations of another one is refused.

    A configuration without evaluations is replaced: it may be the one that had to be mended.
    """
    make_folder(folder)
    path, text = folder / CONFIG, as_yaml(config)
    if path.is_file() and load_history(folder) and read_text(path) != text:
        before = load_config(path)
        search = before.search.replace(budget=config.search.budget)
        if before.replace(search=search, confirm=config.confirm) != config:
            raise TokenCreditError(
                f"{folder} was started with another configuration than this one",
                hint=f"compare {path}; only budget and confirm may change, or take another folder",
            )
    write_text(path, text)


def make_search(config: SearchConfig, folder: Path) -> Search:
    """A search with its pool, signals, evaluator and adviser loaded; nothing is written."""
    materials = load_materials(config.pool)
    if len(materials.pool) < config.search.min_samples:
        raise TokenCreditError(
            f"the pool has {len(materials.pool)} samples, and no recipe may keep fewer than `search.min_samples`, "
            f"{config.search.min_samples}",
            hint=f"write search: {{min_samples: {max(1, len(materials.pool) // 20)}}}, or use a larger pool",
        )
    evaluator = make_evaluator(config.evaluator, materials.pool)
    adviser = Adviser(settings=config.llm, folder=folder) if config.llm is not None else None
    return Search(config=config, materials=materials, evaluator=evaluator, folder=folder, adviser=adviser)


def open_run(folder: Path, confirm: Mapping[str, Any] | None = None) -> Search:
    """A search as a run folder has it, history loaded; `confirm` replaces settings of the confirmation."""
    if not (folder / CONFIG).is_file():
        raise TokenCreditError(f"{folder} is not a run folder ({CONFIG} is missing)")
    config = load_config(folder / CONFIG)
    if confirm:
        config = config.replace(confirm=config.confirm.replace(**confirm))
    search = make_search(config, folder)
    search.load()
    if not search.history:
        raise TokenCreditError(f"{folder} holds no evaluation yet", hint="run `tokencredit recipes search` first")
    return search


def dry_run(config: SearchConfig, folder: Path) -> list[dict[str, Any]]:
    """The warm-up recipes and their sizes, without an evaluation."""
    search = make_search(config, folder)
    draws = []
    for slot in range(1, config.search.warmup + 1):
        candidate = warm_up(search.chooser, slot)
        assert candidate.subset is not None
        state = candidate.state
        draws.append({"slot": slot, "recipe": str(candidate.recipe), "samples": len(candidate.subset), **state})
    return draws
