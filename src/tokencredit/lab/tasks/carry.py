"""Carry: addition written out column by column; one response is right, and its hard steps are the carries."""

import random
import re
from functools import partial

from tokencredit.lab.tasks import gym
from tokencredit.lab.tasks.base import ALPHABET, Problem, Task

GENERATOR = "chain_sum"

_COLUMN = re.compile(r"([0-9])\+([0-9])\+([01])=(0|[1-9][0-9]?)")


def carry_task(*, digits: int = 3) -> Task:
    """The sum of two numbers of `digits` digits.

    Prompt `478+356:`, response `8+6+0=14,7+5+1=13,4+3+1=8;834`: from the last column to the first, each column adds its
    two digits and the carry from the column before; the sum follows.
    """
    return Task(
        name="carry" if digits == 3 else f"carry-{digits}",
        alphabet=ALPHABET,
        max_prompt=2 * digits + 2,
        max_response=9 * digits + digits + 2,
        draw=partial(_draw, digits),
        verify=verify,
        accepted=accepted,
        random_trace=random_trace,
    )


def _draw(digits: int, seed: int) -> Problem:
    rng = random.Random(seed)
    while True:
        entry = gym.item(GENERATOR, rng.getrandbits(63), min_terms=2, max_terms=2, min_digits=digits, max_digits=digits)
        left, operator, right = entry["metadata"]["expression"].split()
        if operator == "+":
            return problem_of(left, right)


def problem_of(left: str, right: str) -> Problem:
    """The problem that asks for `left + right`, both with the same number of digits."""
    first, second = sorted((left, right))
    data = {"left": left, "right": right, "answer": str(int(left) + int(right))}
    return Problem(prompt=f"{left}+{right}:", key=f"{first}+{second}", data=data)


def verify(problem: Problem, response: str) -> bool:
    """Whether every column is right, and reasoning-gym's scorer accepts the sum."""
    work, separator, answer = response.partition(";")
    columns = work.split(",")
    left, right = problem.data["left"], problem.data["right"]
    if not separator or len(columns) != len(left):
        return False
    carry = 0
    for text, a, b in zip(columns, reversed(left), reversed(right), strict=True):
        match = _COLUMN.fullmatch(text)
        total = int(a) + int(b) + carry
        if match is None or match.groups() != (a, b, str(carry), str(total)):
            return False
        carry = total // 10
    # The scorer takes 0834, 834.0 and the like for 834; the task has one way to write a number.
    canonical = answer.isascii() and answer.isdigit() and answer == str(int(answer))
    return canonical and gym.scorer(GENERATOR)(answer, {"answer": problem.data["answer"]}) == 1.0


def accepted(problem: Problem) -> list[str]:
    """The one right response."""
    return [_trace(problem, slip=None, rng=random.Random(0))]


def random_trace(problem: Problem, rng: random.Random, solved: bool | None) -> str:
    """The right response, or one with a single slip at a random place, after which the work goes on consistently.

    Slips: a carry forgotten or invented, a column sum off by one, a digit of the answer copied wrongly.
    """
    if solved is None:
        solved = rng.random() < 0.5
    if solved:
        return _trace(problem, slip=None, rng=rng)
    return _trace(problem, slip=rng.randrange(len(problem.data["left"]) + 1), rng=rng)


def _trace(problem: Problem, slip: int | None, rng: random.Random) -> str:
    """The work in columns; column number `slip` is wrong, where the number of columns stands for the answer."""
    left, right = problem.data["left"], problem.data["right"]
    columns, answer, carry = [], "", 0
    for place, (a, b) in enumerate(zip(reversed(left), reversed(right), strict=True)):
        error = 0
        if place == slip and place > 0 and rng.random() < 0.5:
            carry = 1 - carry
        elif place == slip:
            error = rng.choice([-1, 1])
        total = int(a) + int(b) + carry
        total = total + error if 0 <= total + error <= 19 else total - error
        columns.append(f"{a}+{b}+{carry}={total}")
        answer = str(total % 10) + answer
        carry = total // 10
    answer = str(carry) * (carry > 0) + answer
    if slip == len(left):
        place = rng.randrange(len(answer))
        wrong = rng.choice([digit for digit in "123456789" if digit != answer[place]])
        answer = answer[:place] + wrong + answer[place + 1 :]
    return f"{','.join(columns)};{answer}"
