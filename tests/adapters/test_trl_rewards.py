"""Rewards that are not numbers are refused, from every kind of callable that TRL takes."""

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trl import GRPOTrainer
from trl_setup import ALPHABET, config, reward, trainer

from tokencredit import TokenCreditError
from tokencredit.adapters.trl.rewards import check_models, guard_rewards
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.lab.model import build_model, build_tokenizer


def broken(completions: list[str], bad: Any = float("nan"), **_: Any) -> list[Any]:
    return [0.5] * (len(completions) - 1) + [bad]


async def later(completions: list[str], **_: Any) -> list[Any]:
    return broken(completions)


class Judge:
    def __call__(self, completions: list[str], **_: Any) -> list[Any]:
        return broken(completions)

    def method(self, completions: list[str], **_: Any) -> list[Any]:
        return broken(completions)


class AsyncJudge:
    async def __call__(self, completions: list[str], **_: Any) -> list[Any]:
        return broken(completions)


KINDS = {
    "broken": broken,
    "later": later,
    "Judge": Judge(),
    "method": Judge().method,
    "AsyncJudge": AsyncJudge(),
    "partial": functools.partial(broken, bad=float("-inf")),
    "lambda": lambda completions, **_: torch.tensor(broken(completions)),
}


def call(function: Any) -> Any:
    found = function(completions=["a", "b"])
    return asyncio.run(found) if asyncio.iscoroutine(found) else found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reward_is_guarded(kind: str) -> None:
    with pytest.raises(TokenCreditError, match=r"gave (nan|-inf) for row 1 of its batch"):
        call(guard_rewards(KINDS[kind]))


@pytest.mark.parametrize("bad", [float("inf"), "good", [1.0], 10**400, 1e300])
def test_what_is_not_a_float32_is_refused(bad: Any) -> None:
    with pytest.raises(TokenCreditError, match="row 1 of its batch") as caught:
        call(guard_rewards(functools.partial(broken, bad=bad)))
    assert "\n" not in caught.value.message


def test_what_is_not_a_list_is_refused() -> None:
    with pytest.raises(TokenCreditError, match="one number per response, got float"):
        call(guard_rewards(lambda completions, **_: 1.0))


def test_numbers_pass_and_names_stay() -> None:
    given = [0.5, None, 1, True, torch.tensor(2.0)]
    assert guard_rewards(lambda completions, **_: iter(given))(completions=[]) == given
    assert [function.__name__ for function in guard_rewards([broken, Judge(), functools.partial(broken)])] == [
        "broken",
        "Judge",
        "broken",
    ]
    model = nn.Linear(1, 1)
    assert guard_rewards([model, "org/name"]) == [model, "org/name"]


@pytest.mark.parametrize("kind", ["broken", "later", "Judge"])
@pytest.mark.parametrize("positional", [False, True])
def test_the_trainer_guards_rewards_however_they_are_given(kind: str, positional: bool, tmp_path: Path) -> None:
    arguments = config(tmp_path, max_steps=1)
    if positional:
        tokenizer = build_tokenizer(ALPHABET)
        model = build_model(tokenizer, layers=1, width=16, heads=2, seed=1)
        rows = trainer(GRPOTrainer, arguments).train_dataset
        built = CreditGRPOTrainer(
            model, KINDS[kind], arguments, rows, processing_class=tokenizer, credit="hapo"
        )  # as TRL allows
    else:
        built = trainer(CreditGRPOTrainer, arguments, credit="hapo", reward_funcs=[reward, KINDS[kind]])
    with pytest.raises(TokenCreditError, match=rf"reward function '{kind}' gave nan for row 7"):
        built.train()


def test_a_generator_is_read_once(tmp_path: Path) -> None:
    def yields(completions: list[str], **_: Any) -> Any:
        return (value for value in reward(completions))

    losses = []
    for kind in (GRPOTrainer, CreditGRPOTrainer):
        built = trainer(kind, config(tmp_path, max_steps=1), reward_funcs=yields)
        built.train()
        losses.append([log["loss"] for log in built.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


def test_reward_models_are_checked_where_trl_runs_them() -> None:
    rewards = torch.tensor([[1.0, float("nan")], [float("nan"), 0.0]])
    check_models(rewards, [broken, broken], ["one", "two"])  # None from a function is NaN here
    with pytest.raises(TokenCreditError, match="reward model 'two' gave nan for row 0"):
        check_models(rewards, [broken, nn.Linear(1, 1)], ["one", "two"])
