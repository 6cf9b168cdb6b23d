"""The search loop: choose, pay, write down. Killed anywhere, it resumes to the same history; no run is paid twice."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.files import make_folder, write_bytes, write_text
from tokencredit.progress import bar
from tokencredit.recipes.pool.materials import Materials
from tokencredit.recipes.pool.samples import Positions, json_line, write_lines
from tokencredit.recipes.program.execute import Executor
from tokencredit.recipes.program.recipe import as_mappings, dump_recipe
from tokencredit.recipes.program.state import StateReader
from tokencredit.recipes.search import history as log
from tokencredit.recipes.search.config import SearchConfig
from tokencredit.recipes.search.history import Evaluation, usable
from tokencredit.recipes.search.llm import Adviser
from tokencredit.recipes.search.objective import EvaluationFailed, Evaluator, Objective, Request, make_objective
from tokencredit.recipes.search.paper import best_so_far, choose_paper, stagnated
from tokencredit.recipes.search.policies import (
    Candidate,
    Chooser,
    choose_default,
    choose_random,
    choose_single,
    reseed_due,
)
from tokencredit.recipes.search.propose import make_space
from tokencredit.seeds import derive

CANDIDATES = "candidates.jsonl"
CHOOSERS = {"default": choose_default, "paper": choose_paper, "random": choose_random, "single": choose_single}
RUNNER_UP = 0.9  # Jaccard similarity below which a second finalist is another subset


@dataclass(slots=True, kw_only=True, eq=False)
class Search:
    """A search in a folder. Its state is a function of the configuration and of `history.jsonl`."""

    config: SearchConfig
    materials: Materials
    evaluator: Evaluator
    folder: Path
    adviser: Adviser | None = None
    history: list[Evaluation] = field(default_factory=list)
    objective: Objective = field(init=False)
    chooser: Chooser = field(init=False)

    def __post_init__(self) -> None:
        settings = self.config.search
        self.objective = make_objective(self.config.objective)
        graph = self.materials.graph(settings.clusters) if self.materials.make_graph is not None else None
        self.chooser = Chooser(
            config=self.config,
            executor=Executor(materials=self.materials),
            reader=StateReader(materials=self.materials, graph=graph),
            space=make_space(
                self.materials,
                settings.operators,
                derive("recipes", settings.seed, "random_k") % 2**31,
                settings.clusters,
                settings.max_steps,
            ),
        )

    @property
    def train_seed(self) -> int:
        """One training seed for the whole search: the same subset is the same run."""
        return derive("recipes", self.config.search.seed, "training") % 2**31

    def load(self) -> None:
        """Read the history and execute its recipes again, which proves that pool and signals are still the same."""
        self.history = log.load_history(self.folder)
        for evaluation in self.history:
            subset = self.chooser.executor.run(evaluation.recipe)
            if subset.hash != evaluation.subset_hash:
                raise TokenCreditError(
                    f"slot {evaluation.slot}: its recipe now gives {len(subset)} samples ({subset.hash[:12]}), "
                    f"the history has {evaluation.samples} ({evaluation.subset_hash[:12]})",
                    hint="pool, signals or code changed since; start a new run folder",
                )
            self._remember(evaluation, subset.positions)

    def run(self) -> list[Evaluation]:
        """Fill the remaining slots of the budget."""
        make_folder(self.folder)
        self.load()
        self._drop_unpaid_candidates()
        budget = self.config.search.budget
        with bar("search", budget) as advance:
            advance(len(self.history))
            while len(self.history) < budget:
                evaluation = self.step()
                advance(1, f"slot {evaluation.slot}: {_brief(evaluation)}")
        return self.history

    def step(self) -> Evaluation:
        """Choose and pay for one slot, and write it down before anything else happens."""
        slot = len(self.history) + 1
        chosen, considered = CHOOSERS[self.config.search.policy](self.chooser, slot, self.history)
        if self.adviser is not None and chosen.kind == "search":
            chosen, considered = self.adviser.advise(self.chooser, slot, self.history, chosen, considered)
        self._write_candidates(slot, chosen, considered)
        evaluation = self.evaluate(slot, chosen)
        evaluation = self._with_leader(evaluation)
        assert chosen.subset is not None
        self._write_recipe(evaluation, chosen.subset.positions)
        log.append_evaluation(self.folder, evaluation)
        self.history.append(evaluation)
        self._remember(evaluation, chosen.subset.positions)
        return evaluation

    def evaluate(self, slot: int, chosen: Candidate) -> Evaluation:
        """Pay for a run. A failed one is a record with its reason; it costs budget."""
        subset = chosen.subset
        assert subset is not None
        started = time.monotonic()
        record = Evaluation(
            slot=slot,
            kind=chosen.kind,
            steps=as_mappings(chosen.recipe),
            recipe_hash=subset.recipe_hash,
            subset_hash=subset.hash,
            samples=len(subset),
            tokens=int(self.materials.pool.words[subset.positions].sum()),
            seed=self.train_seed,
            split="search",
            status="ok",
            state=chosen.state,
            mean=chosen.mean,
            sd=chosen.sd,
            parent=chosen.parent,
        )
        request = Request(
            positions=subset.positions,
            subset_hash=subset.hash,
            seed=self.train_seed,
            split="search",
            folder=run_folder(self.folder, self.evaluator.key, subset.hash, self.train_seed, "search"),
            recipe=str(chosen.recipe),
        )
        outcome = pay(self.evaluator, self.objective, request, self._control_points())
        return replace(record, **outcome, seconds=round(time.monotonic() - started, 3))

    def _control_points(self) -> dict[str, float] | None:
        return next((e.points for e in self.history if e.kind == "control" and e.ok), None)

    def _with_leader(self, evaluation: Evaluation) -> Evaluation:
        """Who leads after this run, and whether the next choice starts from a reseeded motif."""
        settings = self.config.search
        history = [*self.history, evaluation]
        if settings.policy != "default":
            leaders = best_so_far(history)
            due = settings.policy == "paper" and stagnated(history, settings.warmup, settings.patience)
            return replace(evaluation, leader=leaders[-1], reseed=due and len(history) > settings.warmup)
        good = usable(history)
        if len(good) < 2:
            return replace(evaluation, leader=good[0].slot if good else None)
        leader = good[int(np.argmax(self.chooser.posterior(good)))].slot
        leaders = [e.leader for e in self.history[settings.warmup - 1 :]] + [leader]
        return replace(evaluation, leader=leader, reseed=reseed_due(leaders, settings.patience))

    def _remember(self, evaluation: Evaluation, positions: Positions) -> None:
        self.chooser.seen[evaluation.subset_hash] = positions
        self.materials.evaluated[evaluation.subset_hash] = positions

    def _write_candidates(self, slot: int, chosen: Candidate, considered: Sequence[Candidate]) -> None:
        lines = []
        for candidate in considered or [chosen]:
            line: dict[str, Any] = {"slot": slot, "steps": as_mappings(candidate.recipe), "why": candidate.why}
            line["chosen"] = candidate.recipe == chosen.recipe
            line |= {"mean": candidate.mean, "sd": candidate.sd, "parent": candidate.parent, "state": candidate.state}
            if candidate.subset is not None:
                line |= {"subset_hash": candidate.subset.hash, "samples": len(candidate.subset)}
            lines.append(json_line(line))
        path = self.folder / CANDIDATES
        try:
            with path.open("ab") as file:
                file.write(b"".join(lines))
        except OSError as error:
            raise TokenCreditError(f"cannot write {str(path)!r}: {error.strerror or error}") from error

    def _drop_unpaid_candidates(self) -> None:
        """Lines of a slot that was chosen and never finished go: it is chosen again."""
        path = self.folder / CANDIDATES
        kept = [line for line in log.lines(path) if line["slot"] <= len(self.history)]
        write_lines(path, kept)

    def _write_recipe(self, evaluation: Evaluation, positions: Positions) -> None:
        pool = self.materials.pool
        recipes, subsets = (make_folder(self.folder / name) for name in ("recipes", "subsets"))
        parent = f"r{evaluation.parent:04d}" if evaluation.parent is not None else ""
        recipe = replace(evaluation.recipe, parent=parent)
        write_text(recipes / f"{recipe.id}.yaml", dump_recipe(recipe, pool.hash))
        ids = b"\n".join(pool.ids[positions].tolist()) + b"\n"
        write_bytes(subsets / f"{evaluation.subset_hash}.ids", ids)

    def finalists(self, count: int = 2) -> list[Evaluation]:
        """The largest posterior means whose subsets differ; fixed before any confirmation is paid for."""
        good = [evaluation for evaluation in usable(self.history) if not evaluation.below_floor]
        if not good:
            raise TokenCreditError("no evaluation of this search finished above the floors")
        means = self.chooser.posterior(good) if self.config.search.policy == "default" and len(good) > 1 else None
        values = means if means is not None else np.array([evaluation.score for evaluation in good])
        chosen: list[Evaluation] = []
        for index in np.argsort(-values, kind="stable").tolist():
            subset = self.chooser.seen[good[index].subset_hash]
            if all(jaccard(subset, self.chooser.seen[other.subset_hash]) < RUNNER_UP for other in chosen):
                chosen.append(good[index])
            if len(chosen) == count:
                break
        return chosen


def pay(
    evaluator: Evaluator, objective: Objective, request: Request, control: dict[str, float] | None
) -> dict[str, Any]:
    """Run the evaluator and turn what it reports into fields of an `Evaluation`."""
    try:
        metrics = evaluator(request)
        points = objective.points(metrics)
    except EvaluationFailed as failure:
        return {"status": "failed", "reason": str(failure)}
    return {
        "score": objective.total(points),
        "points": points,
        "tasks": {name: asdict(task) for name, task in metrics.tasks.items()},
        "below_floor": objective.below_floor(points, control),
    }


def run_folder(folder: Path, evaluator_key: str, subset_hash: str, seed: int, split: str) -> Path:
    """Where a run keeps its files: a name made of everything that moves its numbers."""
    return folder / "evaluations" / f"{subset_hash[:16]}-{evaluator_key[:8]}-{split}-{seed}"


def jaccard(a: Positions, b: Positions) -> float:
    """|a ∩ b| / |a ∪ b| of two subsets."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(len(a) + len(b) - shared, 1)


def _brief(evaluation: Evaluation) -> str:
    if not evaluation.ok:
        return f"failed: {evaluation.reason}"
    return f"{evaluation.score:.2f} with {evaluation.samples} samples ({evaluation.kind})"
