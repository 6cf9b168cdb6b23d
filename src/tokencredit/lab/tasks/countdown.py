"""Countdown: reach the target with all the numbers, `+` and `-`; several traces are right, and choices fork."""

import random
import re
from collections.abc import Iterator
from functools import lru_cache, partial

from tokencredit.lab.tasks import gym
from tokencredit.lab.tasks.base import ALPHABET, Problem, Task

GENERATOR = "countdown"

_NUMBER = "(0|[1-9][0-9]*)"
_STEP = re.compile(rf"{_NUMBER}([+-]){_NUMBER}={_NUMBER}")

Step = tuple[int, str, int, int]  # left, operator, right, result


def countdown_task(*, numbers: int = 3, low: int = 1, high: int = 9) -> Task:
    """Countdown with `numbers` numbers from `low` to `high`.

    Prompt `8,4,6=10:`, response `8+6=14,14-4=10`: each step takes two numbers from the pool and puts back their result,
    which is never negative; the last result is the target. Operands stand in either order, so `6+8=14` is right too.
    """
    digits = len(str(numbers * high))
    name = "countdown" if (numbers, low, high) == (3, 1, 9) else f"countdown-{numbers}-{low}-{high}"
    return Task(
        name=name,
        alphabet=ALPHABET,
        max_prompt=numbers * (len(str(high)) + 1) + digits + 1,
        max_response=(numbers - 1) * (3 * digits + 3) + 1,
        draw=partial(_draw, numbers, low, high),
        verify=verify,
        accepted=accepted,
        random_trace=random_trace,
        solved_first=True,
        warm_steps=1000,
    )


def _draw(numbers: int, low: int, high: int, seed: int) -> Problem:
    entry = gym.item(
        GENERATOR,
        seed,
        min_numbers=numbers,
        max_numbers=numbers,
        min_value=low,
        max_value=high,
        min_target=1,
        max_target=numbers * high,
        operators=("+", "-"),
    )
    return problem_of(entry["metadata"]["numbers"], entry["metadata"]["target"])


def problem_of(numbers: list[int], target: int) -> Problem:
    """The problem that asks for `target` from `numbers`.

    Orders of the same numbers are different problems: there are only 165 sets of numbers, too few to hold some out.
    """
    prompt = f"{','.join(map(str, numbers))}={target}:"
    return Problem(prompt=prompt, key=prompt, data={"numbers": list(numbers), "target": target})


def verify(problem: Problem, response: str) -> bool:
    """Whether `response` is a valid trace whose expression reasoning-gym scores as the solution."""
    pool: dict[int, list[str]] = {}  # value -> the expressions in the pool that have it
    for number in problem.data["numbers"]:
        pool.setdefault(number, []).append(str(number))
    steps = response.split(",")
    if len(steps) != len(problem.data["numbers"]) - 1:
        return False
    expression = ""
    for text in steps:
        match = _STEP.fullmatch(text)
        if match is None:
            return False
        left, operator, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
        if not pool.get(left):
            return False
        first = pool[left].pop()
        if not pool.get(right) or result != (left + right if operator == "+" else left - right):
            return False
        expression = f"({first}{operator}{pool[right].pop()})"
        pool.setdefault(result, []).append(expression)
    return _solves(expression, tuple(problem.data["numbers"]), problem.data["target"])


@lru_cache(maxsize=65536)
def _solves(expression: str, numbers: tuple[int, ...], target: int) -> bool:
    entry = {"answer": "", "metadata": {"numbers": list(numbers), "target": target}}
    return gym.scorer(GENERATOR)(expression, entry) == 1.0


def accepted(problem: Problem) -> list[str]:
    """Every valid trace, found by trying all steps."""
    target = problem.data["target"]
    traces = _traces(tuple(problem.data["numbers"]))
    return sorted({",".join(map(_written, trace)) for trace in traces if trace[-1][3] == target})


def random_trace(problem: Problem, rng: random.Random, solved: bool | None) -> str:
    """A trace with valid steps, chosen uniformly at each step; or, if `solved`, uniformly among the accepted ones."""
    if solved:
        return rng.choice(_accepted_cached(tuple(problem.data["numbers"]), problem.data["target"]))
    while True:
        pool, trace = list(problem.data["numbers"]), []
        while len(pool) > 1:
            left, operator, right, result = rng.choice(_steps(tuple(pool)))
            pool.remove(left)
            pool.remove(right)
            pool.append(result)
            trace.append(_written((left, operator, right, result)))
        if solved is None or pool[0] != problem.data["target"]:
            return ",".join(trace)


@lru_cache(maxsize=65536)
def _accepted_cached(numbers: tuple[int, ...], target: int) -> list[str]:
    return accepted(problem_of(list(numbers), target))


def _traces(pool: tuple[int, ...]) -> Iterator[tuple[Step, ...]]:
    if len(pool) == 1:
        yield ()
        return
    for step in _steps(pool):
        rest = list(pool)
        rest.remove(step[0])
        rest.remove(step[2])
        for trace in _traces((*rest, step[3])):
            yield (step, *trace)


@lru_cache(maxsize=65536)
def _steps(pool: tuple[int, ...]) -> list[Step]:
    """All steps that `pool` allows, one for each ordered pair of places and operator."""
    pairs = [(a, b) for i, a in enumerate(pool) for j, b in enumerate(pool) if i != j]
    sums = [(a, "+", b, a + b) for a, b in pairs]
    return sums + [(a, "-", b, a - b) for a, b in pairs if a >= b]


def _written(step: Step) -> str:
    left, operator, right, result = step
    return f"{left}{operator}{right}={result}"
