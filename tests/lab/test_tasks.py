"""Lab tasks: the verifier accepts exactly what the enumeration lists, and splits never meet."""

import itertools
import random
from collections.abc import Iterator

import pytest

from tokencredit.errors import TokenCreditError
from tokencredit.lab.tasks import (
    SPLITS,
    TASKS,
    Problem,
    Task,
    carry,
    carry_task,
    chain,
    chain_task,
    countdown,
    countdown_task,
    get_task,
    gym,
)

names = pytest.mark.parametrize("name", sorted(TASKS))


def mutations(text: str, characters: str) -> Iterator[str]:
    """All texts one edit away from `text`: substitutions, insertions, deletions, neighbours swapped."""
    for place in range(len(text) + 1):
        head, tail = text[:place], text[place:]
        yield from (head + character + tail for character in characters)
        yield head + tail[1:]
        yield from (head + character + tail[1:] for character in characters)
        yield head + tail[1:2] + tail[:1] + tail[2:]


def strings(characters: str, longest: int) -> Iterator[str]:
    for length in range(longest + 1):
        yield from map("".join, itertools.product(characters, repeat=length))


def verified(task: Task, problem: Problem, candidates: Iterator[str]) -> set[str]:
    return {text for text in candidates if task.verify(problem, text)}


def test_countdown_lists_the_six_traces_of_a_problem() -> None:
    # 8 + 6 - 4 is the only way to 10: sum first in two orders, or either difference first and a sum in two orders
    expected = {
        "8+6=14,14-4=10",
        "6+8=14,14-4=10",
        "8-4=4,4+6=10",
        "8-4=4,6+4=10",
        "6-4=2,2+8=10",
        "6-4=2,8+2=10",
    }
    assert set(countdown.accepted(countdown.problem_of([8, 4, 6], 10))) == expected


def test_carry_lists_the_one_response() -> None:
    assert carry.accepted(carry.problem_of("478", "356")) == ["8+6+0=14,7+5+1=13,4+3+1=8;834"]
    assert carry.accepted(carry.problem_of("95", "05")) == ["5+5+0=10,9+0+1=10;100"]


def test_chain_lists_both_orders_of_every_sum() -> None:
    problem = chain.problem_of("4+9-3+5")
    assert problem.prompt == "4a+9b-3c+5:"
    assert chain.accepted(problem) == sorted(
        f"{first},b13-3=10,{last}" for first in ("a4+9=13", "a9+4=13") for last in ("c10+5=15", "c5+10=15")
    )


@pytest.mark.parametrize(("numbers", "target"), [([3, 2], 5), ([2, 1], 1), ([1, 1], 5)])
def test_countdown_agrees_on_every_short_string(numbers: list[int], target: int) -> None:
    problem = countdown.problem_of(numbers, target)
    found = verified(countdown_task(numbers=2), problem, strings("01235+-=", 5))
    assert found == set(countdown.accepted(problem))


def test_countdown_agrees_on_every_pair_of_steps() -> None:
    values, problem = range(4), countdown.problem_of([1, 1, 2], 2)
    steps = [f"{a}{op}{b}={c}" for a, op, b, c in itertools.product(values, "+-", values, values)]
    pairs = (f"{first},{second}" for first, second in itertools.product(steps, repeat=2))
    found = verified(get_task("countdown"), problem, pairs)
    assert "1-1=0,2-0=2" in found  # zero is a number like the others
    assert found == set(countdown.accepted(problem))


@pytest.mark.parametrize(("left", "right"), [("7", "5"), ("2", "3"), ("0", "0")])
def test_carry_agrees_on_every_column(left: str, right: str) -> None:
    problem = carry.problem_of(left, right)
    parts = itertools.product(range(10), range(10), range(3), range(20), range(20))
    columns = (f"{a}+{b}+{c}={total};{answer}" for a, b, c, total, answer in parts)
    assert verified(carry_task(digits=1), problem, columns) == set(carry.accepted(problem))


def test_chain_agrees_on_every_short_string() -> None:
    problem = chain.problem_of("2+3")
    assert verified(chain_task(terms=2), problem, strings("ab235+=", 6)) == {"a2+3=5", "a3+2=5"}


@names
def test_verifier_and_enumeration_agree_around_accepted_responses(name: str) -> None:
    task = get_task(name)
    for problem in task.problems("test", 4, seed=3):
        accepted = task.accepted(problem)
        assert len(set(accepted)) == len(accepted) <= 100
        for text in random.Random(0).sample(accepted, k=min(4, len(accepted))):
            near = verified(task, problem, itertools.chain([text], mutations(text, task.alphabet + " ٣²\n")))
            assert text in near and near <= set(accepted)


@names
def test_every_accepted_response_is_verified(name: str) -> None:
    task = get_task(name)
    for problem in task.problems("train", 30, seed=1):
        assert all(task.verify(problem, text) for text in task.accepted(problem))


@names
def test_random_traces_solve_when_asked_to(name: str) -> None:
    task, rng = get_task(name), random.Random(0)
    for problem in task.problems("sft", 60):
        accepted = set(task.accepted(problem))
        for solved in (True, False):
            text = task.random_trace(problem, rng, solved)
            assert (text in accepted) == task.verify(problem, text) == solved
            assert set(text) <= set(task.alphabet) and len(text) < task.max_response
        text = task.random_trace(problem, rng, None)
        assert (text in accepted) == task.verify(problem, text)


@names
def test_sizes_hold_the_longest_prompt_and_response(name: str) -> None:
    task = get_task(name)
    problems = task.problems("train", 100, seed=2)
    assert max(len(problem.prompt) for problem in problems) <= task.max_prompt
    assert max(len(text) for problem in problems for text in task.accepted(problem)) + 1 <= task.max_response
    assert all(set(problem.prompt) <= set(task.alphabet) for problem in problems)


def test_chain_is_long() -> None:
    task = get_task("chain")
    responses = [text for problem in task.problems("test", 100) for text in task.accepted(problem)]
    assert min(map(len, responses)) >= 60


@names
def test_splits_share_no_problem_under_any_seed(name: str) -> None:
    task = get_task(name)
    keys = {split: {problem.key for seed in range(3) for problem in task.problems(split, 40, seed)} for split in SPLITS}
    for first, second in itertools.combinations(SPLITS, 2):
        assert not keys[first] & keys[second]
    assert all(task.split_of(problem) == "test" for problem in task.problems("test", 50))


def test_countdown_splits_by_the_prompt() -> None:
    first, second = countdown.problem_of([3, 5, 9], 17), countdown.problem_of([9, 3, 5], 17)
    assert first.key == first.prompt != second.prompt == second.key


@names
def test_problems_are_a_prefix_of_more_problems(name: str) -> None:
    task = get_task(name)
    assert task.problems("train", 5, seed=4) == task.problems("train", 12, seed=4)[:5]


@names
def test_neighbouring_seeds_are_not_shifted_copies(name: str) -> None:
    task = get_task(name)
    first, second = (task.problems("train", 12, seed=seed) for seed in (0, 1))
    assert first != second and first[1:] != second[:-1]


@names
def test_problems_survive_json(name: str) -> None:
    for problem in get_task(name).problems("test", 5):
        assert Problem.from_json(problem.to_json()) == problem


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (get_task("countdown"), countdown.problem_of([7, 8, 9], 6)),
        (get_task("carry"), carry.problem_of("478", "356")),
        (get_task("chain"), chain.problem_of("4+9-3")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_scorer_of_reasoning_gym_has_the_last_word(
    task: Task, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = task.accepted(problem)[0]
    assert task.verify(problem, text)
    countdown._solves.cache_clear()
    monkeypatch.setattr(gym, "scorer", lambda generator: lambda answer, entry: 0.99)
    assert not task.verify(problem, text)
    countdown._solves.cache_clear()


def test_unknown_names_list_the_accepted_ones() -> None:
    with pytest.raises(TokenCreditError, match=r"unknown task 'countdwn', did you mean 'countdown'\?"):
        get_task("countdwn")
    with pytest.raises(TokenCreditError, match=r"unknown split 'tset', did you mean 'test'\?"):
        get_task("carry").problems("tset", 1)


def test_a_split_without_problems_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = countdown_task(numbers=2, low=1, high=1)  # one problem, 1,1=2, in one split
    (mine,) = [split for split in SPLITS if task.split_of(countdown.problem_of([1, 1], 2)) == split]
    assert len(task.problems(mine, 3)) == 3
    monkeypatch.setattr("tokencredit.lab.tasks.base.DRAWS", 20)
    for split in SPLITS.keys() - {mine}:
        with pytest.raises(TokenCreditError, match=f"has no problem in split '{split}'"):
            task.problems(split, 1)
