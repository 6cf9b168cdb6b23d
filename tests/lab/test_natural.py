"""Families of reasoning-gym as tasks: parameters, splits, answer rules and rewards."""

import json

import pytest

from tokencredit.errors import TokenCreditError
from tokencredit.lab.natural import RULES, NaturalTask, is_natural, parse_task, reward_functions

SUMS = "gym:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1"


@pytest.mark.parametrize(
    ("rule", "text", "answer"),
    [
        ("last_number", "3 + 4 is 7.", "7"),
        ("last_number", "so −12", "-12"),
        ("last_number", "about 1,234,567.5 in total", "1234567.5"),
        ("last_number", "the odds are 3/4", "3/4"),
        ("last_number", "no idea", None),
        ("boxed", r"thus \boxed{1} and finally \boxed{\frac{3}{4}} .", r"\frac{3}{4}"),
        ("boxed", r"cut off \boxed{12", None),
        ("boxed", "12", None),
        ("tag", "<answer>x</answer> no, <answer>\n y </answer>", "y"),
        ("tag", "<answer>x", None),
        ("whole", "  yes \n", "yes"),
        ("whole", " \n", None),
    ],
)
def test_answer_rules(rule: str, text: str, answer: str | None) -> None:
    assert RULES[rule].find(text) == answer


def test_a_name_with_parameters_and_a_mapping_mean_the_same() -> None:
    given = {"name": "gym:chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert parse_task(SUMS) == parse_task(given)
    assert is_natural(SUMS) and not is_natural("countdown") and not is_natural(None)
    assert parse_task(SUMS).name == SUMS


def test_splits_share_no_question_and_do_not_depend_on_the_count() -> None:
    task = parse_task(SUMS)
    train, test = ({row["question"] for row in task.problems(split, 30)} for split in ("train", "test"))
    assert train and test and not train & test
    assert task.problems("train", 3) == task.problems("train", 5)[:3]
    assert task.problems("train", 3, seed=1) != task.problems("train", 3)


def test_rewards_are_those_of_the_family_and_partial_credit_is_asked_for() -> None:
    task = parse_task(SUMS)
    entry = {"question": "4 + 8 =", "answer": "12", "metadata": {"source_dataset": "chain_sum"}}
    rewards = reward_functions(task)
    texts = ["4 + 8 is 12", "It is 112", [{"role": "assistant", "content": "12"}], "twelve"]
    assert rewards["correct"](texts, entry=[json.dumps(entry)] * 4) == [1.0, 0.0, 1.0, 0.0]
    assert rewards["format"](texts) == [1.0, 1.0, 1.0, 0.0]
    partial = NaturalTask(family="chain_sum", rule="last_number", partial=True)
    assert 0.0 < partial.score("112", entry) < 1.0  # the right answer is part of the wrong one


def test_the_rule_follows_the_answers() -> None:
    assert parse_task(SUMS).rule == "last_number"
    words = parse_task("gym:spell_backward")
    assert words.rule == "tag"
    assert words.prompt("Spell it.").endswith("</answer>.")
    assert parse_task(SUMS).prompt("4 + 8 =") == "4 + 8 ="
    assert parse_task(SUMS + ",answer=boxed").prompt("4 + 8 =").endswith("\\boxed{}.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gym:chain_sums", "did you mean 'chain_sum'"),
        ("gym:chain_sum,max_term=2", "did you mean 'max_terms'"),
        ("gym:chain_sum,max_terms", "cannot read 'max_terms'"),
        ("gym:chain_sum,answer=boxd", "did you mean 'boxed'"),
        ("gym:chain_sum,partial=2", "`partial`"),
        ("gym:chain_sum,max_terms=[", "not valid YAML"),
    ],
)
def test_bad_names_are_one_line(given: str, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message.replace("[", r"\[")):
        parse_task(given)


def test_parameters_that_the_family_refuses_are_one_line() -> None:
    with pytest.raises(TokenCreditError, match="reasoning-gym refuses the parameters"):
        parse_task("gym:chain_sum,min_terms=5,max_terms=2")
