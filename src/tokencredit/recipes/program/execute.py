"""Running a recipe on the pool: prefix cache, trace of every step, recipe and subset hashes."""

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.samples import Positions
from tokencredit.recipes.program.operators.table import OPERATORS
from tokencredit.recipes.program.recipe import Recipe, Step, canonical, used_signals
from tokencredit.recipes.signals.materials import Materials

CACHE_BYTES = 256 << 20  # subsets of program prefixes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """What one step kept; counts before and after."""

    op: str
    samples_before: int
    samples: int
    tokens_before: int
    tokens: int
    seconds: float
    note: str = ""  # "identity", "cached"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subset:
    """A materialised recipe. `hash` names the set of samples, `recipe_hash` the program with all that it read."""

    positions: Positions
    hash: str
    recipe_hash: str
    trace: tuple[StepTrace, ...]

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(slots=True, kw_only=True, eq=False)
class Executor:
    """Executes recipes on fixed materials and keeps the subsets of program prefixes."""

    materials: Materials
    materialisations: int = 0
    _prefixes: OrderedDict[str, Positions] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def run(self, recipe: Recipe) -> Subset:
        """Execute; an empty result, a missing signal or an absent source is an error that names the step."""
        pool = self.materials.pool
        current = np.arange(len(pool), dtype=np.int32)
        trace = []
        self.materialisations += 1
        for number, step in enumerate(recipe.steps, start=1):
            started = time.perf_counter()
            after, cached = self._step(recipe.steps[:number], step, current)
            if len(after) == 0:
                raise TokenCreditError(
                    f"step {number} ({step.op}) leaves no sample of {len(current)}",
                    hint="loosen the step; `tokencredit recipes run --trace` shows what each step keeps",
                )
            note = "cached" if cached else ""
            if len(after) == len(current) and np.array_equal(after, current):
                note = "identity"
            trace.append(
                StepTrace(
                    op=step.op,
                    samples_before=len(current),
                    samples=len(after),
                    tokens_before=int(pool.words[current].sum()),
                    tokens=int(pool.words[after].sum()),
                    seconds=time.perf_counter() - started,
                    note=note,
                )
            )
            current = after
        subset_hash, recipe_hash = pool.subset_hash(current), self.recipe_hash(recipe)
        return Subset(positions=current, hash=subset_hash, recipe_hash=recipe_hash, trace=tuple(trace))

    def _step(self, prefix: tuple[Step, ...], step: Step, current: Positions) -> tuple[Positions, bool]:
        key = canonical(prefix)
        if key in self._prefixes:
            self._prefixes.move_to_end(key)
            return self._prefixes[key], True
        after = OPERATORS[step.op].fn(self.materials, current, **step.params)
        after.setflags(write=False)
        self._prefixes[key] = after
        self._bytes += after.nbytes
        while self._bytes > CACHE_BYTES and len(self._prefixes) > 1:
            self._bytes -= self._prefixes.popitem(last=False)[1].nbytes
        return after, False

    def recipe_hash(self, recipe: Recipe) -> str:
        """SHA-256 over the program, the pool and the fingerprints of the signals and graphs that it reads."""
        materials = self.materials
        prints = [f"{name}={materials.keys.get(name, '')}" for name in used_signals(recipe.steps)]
        for step in recipe.steps:
            if step.op == "semdedup" and not step.params.get("recluster"):
                clusters, exact = step.params.get("clusters", 1000), step.params.get("exact", False)
                prints.append(f"graph={materials.graph(clusters, exact).hash}")
        parts = [canonical(recipe.steps), materials.pool.hash, *prints]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
