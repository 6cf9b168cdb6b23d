"""The table of evaluators: what `evaluator.kind` of a search file may name."""

from collections.abc import Callable, Mapping
from typing import Any

from tokencredit.errors import unknown
from tokencredit.recipes.evaluate.ngram import make_ngram_evaluator
from tokencredit.recipes.evaluate.records import Evaluator
from tokencredit.recipes.evaluate.replay import make_replay_evaluator
from tokencredit.recipes.evaluate.sft import make_sft_evaluator
from tokencredit.recipes.evaluate.shell import make_shell_evaluator
from tokencredit.recipes.pool.samples import Pool

EVALUATORS: dict[str, Callable[[Mapping[str, Any], Pool], Evaluator]] = {
    "ngram": make_ngram_evaluator,
    "replay": make_replay_evaluator,
    "sft": make_sft_evaluator,
    "shell": make_shell_evaluator,
}


def make_evaluator(config: Mapping[str, Any], pool: Pool) -> Evaluator:
    """Make the evaluator of the `evaluator` block of a search file."""
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in EVALUATORS:
        raise unknown("evaluator", kind, EVALUATORS)
    return EVALUATORS[kind]({name: value for name, value in config.items() if name != "kind"}, pool)
