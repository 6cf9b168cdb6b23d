"""The search loop: choose, pay, write down. Killed anywhere, it resumes to the same history; no run is paid twice."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.files import make_folder, write_text
from tokencredit.progress import bar
from tokencredit.recipes.evaluate.history import Evaluation, append_evaluation, load_history, usable
from tokencredit.recipes.evaluate.records import EvaluationFailed, Evaluator, Request
from tokencredit.recipes.pool.lines import append, json_line, read_log, write_lines
from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.program.execute import Executor
from tokencredit.recipes.program.recipe import as_mappings, dump_recipe
from tokencredit.recipes.program.state import StateReader
from tokencredit.recipes.search.config import SearchConfig
from tokencredit.recipes.search.llm import Adviser
from tokencredit.recipes.search.objective import Objective
from tokencredit.recipes.search.paper import best_so_far, choose_paper, stagnated
from tokencredit.recipes.search.policies import (
    Candidate,
    Choice,
    Chooser,
    choose_default,
    choose_random,
    choose_single,
    reseed_due,
)
from tokencredit.recipes.search.propose import make_space
from tokencredit.recipes.signals.materials import Materials
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
        self.objective = self.config.target
        graph = self.materials.graph(settings.clusters) if self.materials.make_graph is not None else None
        self.chooser = Chooser(
            config=self.config,
            executor=Executor(materials=self.materials),
            reader=StateReader(materials=self.materials, graph=graph),
            space=make_space(self.materials, settings, derive("recipes", settings.seed, "random_k") % 2**31),
        )

    @property
    def train_seed(self) -> int:
        """One training seed for the whole search: the same subset is the same run."""
        return derive("recipes", self.config.search.seed, "training") % 2**31

    def load(self) -> None:
        """Read the history and execute its recipes again, which proves that pool and signals are still the same."""
        self.history = load_history(self.folder)
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
        # Lines of a slot that was chosen and never finished go: it is chosen again.
        path = self.folder / CANDIDATES
        write_lines(path, [line for line in read_log(path) if line["slot"] <= len(self.history)])
        budget = self.config.search.budget
        with bar("search", budget) as advance:
            advance(len(self.history))
            while len(self.history) < budget:
                evaluation = self.step()
                advance(1, f"slot {evaluation.slot}: {_brief(evaluation)}")
        return self.history

    def step(self) -> Evaluation:
        """Choose and pay for one slot, and write it down before anything else happens."""
        choice = CHOOSERS[self.config.search.policy](self.chooser, self.history)
        if self.adviser is not None and choice.candidate.kind == "search":
            choice = self.adviser.advise(self.chooser, self.history, choice)
        self._write_candidates(choice)
        evaluation = self._with_leader(self.evaluate(choice.candidate))
        assert choice.candidate.subset is not None
        positions = choice.candidate.subset.positions
        self._write_recipe(evaluation, positions)
        append_evaluation(self.folder, evaluation)
        self.history.append(evaluation)
        self._remember(evaluation, positions)
        return evaluation

    def evaluate(self, chosen: Candidate) -> Evaluation:
        """Pay for a run. A failed one is a record with its reason; it costs budget."""
        subset, started = chosen.subset, time.monotonic()
        assert subset is not None
        control = next((e.points for e in self.history if e.kind == "control" and e.ok), None)
        outcome = self.pay(subset.positions, subset.hash, self.train_seed, "search", str(chosen.recipe))
        outcome.pop("items")
        if "points" in outcome:
            outcome["below_floor"] = self.objective.below_floor(outcome["points"], control)
        return Evaluation(
            slot=len(self.history) + 1,
            kind=chosen.kind,
            steps=as_mappings(chosen.recipe),
            recipe_hash=subset.recipe_hash,
            subset_hash=subset.hash,
            samples=len(subset),
            tokens=self.tokens_of(subset.positions),
            seed=self.train_seed,
            split="search",
            state=chosen.state,
            mean=chosen.mean,
            sd=chosen.sd,
            parent=chosen.parent,
            seconds=round(time.monotonic() - started, 3),
            **outcome,
        )

    def pay(self, positions: Positions, subset_hash: str, seed: int, split: str, recipe: str) -> dict[str, Any]:
        """Run the evaluator and turn what it reports into fields of a log; its files are in a folder of its own."""
        # The name of a run's folder is made of everything that moves its numbers.
        name = f"{subset_hash[:16]}-{self.evaluator.key[:8]}-{split}-{seed}"
        request = Request(
            positions=positions,
            subset_hash=subset_hash,
            seed=seed,
            split=split,
            folder=self.folder / "evaluations" / name,
            recipe=recipe,
        )
        try:
            metrics = self.evaluator(request)
            points = self.objective.points(metrics)
        except EvaluationFailed as failure:
            return {"status": "failed", "reason": str(failure), "items": []}
        facts = {"status": "ok", "score": self.objective.total(points), "points": points}
        return facts | {"tasks": metrics.task_mappings(), "items": metrics.item_rows()}

    def tokens_of(self, positions: Positions) -> int:
        """The words of a subset."""
        return int(self.materials.pool.words[positions].sum())

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

    def _write_candidates(self, choice: Choice) -> None:
        lines = []
        for candidate in choice.considered or [choice.candidate]:
            line: dict[str, Any] = {"slot": len(self.history) + 1, "steps": as_mappings(candidate.recipe)}
            line |= {"why": candidate.why, "chosen": candidate.recipe == choice.candidate.recipe}
            line |= {"mean": candidate.mean, "sd": candidate.sd, "parent": candidate.parent, "state": candidate.state}
            if candidate.subset is not None:
                line |= {"subset_hash": candidate.subset.hash, "samples": len(candidate.subset)}
            lines.append(json_line(line))
        append(self.folder / CANDIDATES, b"".join(lines))

    def _write_recipe(self, evaluation: Evaluation, positions: Positions) -> None:
        pool = self.materials.pool
        recipes, subsets = (make_folder(self.folder / name) for name in ("recipes", "subsets"))
        parent = f"r{evaluation.parent:04d}" if evaluation.parent is not None else ""
        recipe = replace(evaluation.recipe, parent=parent)
        write_text(recipes / f"{recipe.id}.yaml", dump_recipe(recipe, pool.hash))
        pool.write_ids(positions, subsets / f"{evaluation.subset_hash}.ids")

    def finalists(self, count: int = 2) -> list[Evaluation]:
        """The largest posterior means whose subsets differ; fixed before any confirmation is paid for."""
        good = [evaluation for evaluation in usable(self.history) if not evaluation.below_floor]
        if not good:
            raise TokenCreditError("no evaluation of this search finished above the floors")
        values = np.array([evaluation.score for evaluation in good])
        if self.config.search.policy == "default" and len(good) > 1:
            values = self.chooser.posterior(good)
        chosen: list[Evaluation] = []
        for index in np.argsort(-values, kind="stable").tolist():
            subset = self.chooser.seen[good[index].subset_hash]
            if all(jaccard(subset, self.chooser.seen[other.subset_hash]) < RUNNER_UP for other in chosen):
                chosen.append(good[index])
            if len(chosen) == count:
                break
        return chosen


def jaccard(a: Positions, b: Positions) -> float:
    """|a ∩ b| / |a ∪ b| of two subsets."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(len(a) + len(b) - shared, 1)


def _brief(evaluation: Evaluation) -> str:
    if not evaluation.ok:
        return f"failed: {evaluation.reason}"
    return f"{evaluation.score:.2f} with {evaluation.samples} samples ({evaluation.kind})"
