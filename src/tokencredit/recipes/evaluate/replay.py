"""The evaluator that answers from logs of past runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.evaluate.history import load_history
from tokencredit.recipes.evaluate.records import Evaluator, Metrics, Request, TaskScore
from tokencredit.recipes.pool.samples import Pool
from tokencredit.settings import Settings, Words


class ReplaySettings(Settings):
    """`evaluator:` of a search file with `kind: replay`."""

    section: ClassVar[str] = "evaluator"
    key_kind: ClassVar[str] = "key of evaluator 'replay'"

    runs: Annotated[list[str], Field(min_length=1), Words("a list of run folders")]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayEvaluator:
    """Answers from logs of past runs, keyed by subset, seed and split; a miss is an error."""

    results: Mapping[tuple[str, int, str], Metrics]
    key: str = "replay"

    def __call__(self, request: Request) -> Metrics:
        metrics = self.results.get((request.subset_hash, request.seed, request.split))
        if metrics is None:
            raise TokenCreditError(
                f"no logged run of subset {request.subset_hash[:12]} with seed {request.seed} on split "
                f"{request.split!r} among {len(self.results)} logged runs",
                hint="replay needs the configuration and the pool of the original search",
            )
        return metrics


def replay_of(folders: Sequence[Path]) -> ReplayEvaluator:
    """Replay the histories in run folders."""
    results = {}
    for evaluation in (e for folder in folders for e in load_history(folder) if e.ok):
        tasks = {name: TaskScore(**task) for name, task in evaluation.tasks.items()}  # type: ignore[arg-type]
        results[evaluation.subset_hash, evaluation.seed, evaluation.split] = Metrics(tasks=tasks)
    return ReplayEvaluator(results=results)


def make_replay_evaluator(config: Mapping[str, Any], pool: Pool) -> Evaluator:
    """Make the evaluator of an `evaluator` block with `runs`."""
    return replay_of([Path(run) for run in ReplaySettings.read(config).runs])
