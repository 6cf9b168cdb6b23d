"""Chain: a long sum worked off term by term; an early slip spoils sixty tokens, and some forks do not matter."""

import itertools
import random
import re
from functools import partial

from tokencredit.errors import TokenCreditError
from tokencredit.lab.tasks import gym
from tokencredit.lab.tasks.base import ALPHABET, Problem, Task

GENERATOR = "chain_sum"

_NUMBER = "(0|[1-9][0-9]*)"
_STEP = re.compile(rf"([a-z]){_NUMBER}([+-]){_NUMBER}={_NUMBER}")

LABELS = "abcdefghij"


def chain_task(*, terms: int = 10, sums: int = 5, highest: int = 19) -> Task:
    """A chain of `terms` one-digit terms, at most `sums` of them added, with running totals from 0 to `highest`.

    Prompt `4a+9b-3:`, response `a4+9=13,b13-3=10`: step b takes the running total and the term behind the label b. A
    sum may be written in either order (`a9+4=13`), so up to 2^sums responses are accepted; which order is chosen makes
    no difference to success, though it carries entropy. The verifier wants every step right: nothing repairs a slip.
    """
    if not 2 <= terms <= len(LABELS) + 1:
        raise TokenCreditError(f"`terms` must be in [2, {len(LABELS) + 1}], got {terms}")
    if highest < 9:
        raise TokenCreditError(f"`highest` must be at least 9, the largest term, got {highest}")
    digits = len(str(highest + 10 * terms))  # room for traces with a slip
    return Task(
        name="chain" if (terms, sums, highest) == (10, 5, 19) else f"chain-{terms}-{sums}-{highest}",
        alphabet=ALPHABET,
        max_prompt=3 * terms - 1,
        max_response=(terms - 1) * (2 * digits + 5) + 1,
        draw=partial(_draw, terms, sums, highest),
        verify=verify,
        accepted=accepted,
        random_trace=random_trace,
        easier=chain_task(terms=3, sums=sums, highest=highest) if terms > 3 else None,
    )


def _draw(terms: int, sums: int, highest: int, seed: int) -> Problem:
    rng = random.Random(seed)
    while True:
        entry = gym.item(GENERATOR, rng.getrandbits(63), min_terms=terms, max_terms=terms, min_digits=1, max_digits=1)
        expression = entry["metadata"]["expression"].replace(" ", "")
        totals = _totals(expression)
        if expression.count("+") <= sums and min(totals) >= 0 and max(totals) <= highest:
            return problem_of(expression)


def problem_of(expression: str) -> Problem:
    """The problem that asks for the value of `expression`, such as `4+9-3`."""
    start, operations = _parsed(expression)
    steps = zip(LABELS, operations, strict=False)
    return Problem(
        prompt=str(start) + "".join(f"{label}{operator}{term}" for label, (operator, term) in steps) + ":",
        key=expression,
        data={"expression": expression, "answer": str(_totals(expression)[-1])},
    )


def verify(problem: Problem, response: str) -> bool:
    """Whether every step is right, and reasoning-gym's scorer accepts the last total."""
    start, operations = _parsed(problem.data["expression"])
    steps = response.split(",")
    if len(steps) != len(operations):
        return False
    total = start
    for label, text, (operator, term) in zip(LABELS, steps, operations, strict=False):
        match = _STEP.fullmatch(text)
        if match is None or (match[1], match[3]) != (label, operator):
            return False
        operands = (int(match[2]), int(match[4]))
        if operands != (total, term) and not (operator == "+" and operands == (term, total)):
            return False
        total = total + term if operator == "+" else total - term
        if match[5] != str(total):
            return False
    return gym.scorer(GENERATOR)(str(total), {"answer": problem.data["answer"]}) == 1.0


def accepted(problem: Problem) -> list[str]:
    """The steps of the chain with each sum in both orders."""
    total, operations = _parsed(problem.data["expression"])
    choices: list[list[str]] = []
    for label, (operator, term) in zip(LABELS, operations, strict=False):
        choices.append(_written(label, total, operator, term, _applied(total, operator, term)))
        total = _applied(total, operator, term)
    return sorted(",".join(steps) for steps in itertools.product(*choices))


def random_trace(problem: Problem, rng: random.Random, solved: bool | None) -> str:
    """Sums in a random order; unless `solved`, one slip at a random step, after which the work goes on consistently.

    Slips: a result off by one, two or ten, the other operator, another term. None takes the total below zero.
    """
    if solved is None:
        solved = rng.random() < 0.5
    total, operations = _parsed(problem.data["expression"])
    lowest = _lowest_ahead(problem.data["expression"])
    slip = None if solved else rng.randrange(len(operations))
    steps = []
    for place, (operator, term) in enumerate(operations):
        result = _applied(total, operator, term)
        if place == slip:
            slack = lowest[place]  # how far the total may sink here and stay at zero or above to the end
            operator, term, result = rng.choice([w for w in _slips(total, operator, term) if w[2] >= result - slack])
        steps.append(rng.choice(_written(LABELS[place], total, operator, term, result)))
        total = result
    return ",".join(steps)


def _slips(total: int, operator: str, term: int) -> list[tuple[str, int, int]]:
    """Wrong steps as operator, term and result."""
    right = _applied(total, operator, term)
    results = [(operator, term, right + error) for error in (-10, -2, -1, 1, 2, 10)]
    other = "-" if operator == "+" else "+"
    operators = [(other, term, _applied(total, other, term))] if term > 0 else []
    terms = [(operator, t, _applied(total, operator, t)) for t in range(10) if t != term]
    return [step for step in results + operators + terms if step[2] >= 0]


def _lowest_ahead(expression: str) -> list[int]:
    """For each step, the lowest total from its result to the end."""
    totals = _totals(expression)[1:]
    return [min(totals[place:]) for place in range(len(totals))]


def _totals(expression: str) -> list[int]:
    start, operations = _parsed(expression)
    signed = [term if operator == "+" else -term for operator, term in operations]
    return list(itertools.accumulate(signed, initial=start))


def _parsed(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """`4+9-3` as 4 and [("+", 9), ("-", 3)]."""
    first, *rest = re.findall(r"[+-]?[0-9]+", expression)
    return int(first), [(text[0], int(text[1:])) for text in rest]


def _applied(total: int, operator: str, term: int) -> int:
    return total + term if operator == "+" else total - term


def _written(label: str, total: int, operator: str, term: int, result: int) -> list[str]:
    orders = [(total, term)] if operator == "-" or total == term else [(total, term), (term, total)]
    return [f"{label}{left}{operator}{right}={result}" for left, right in orders]
