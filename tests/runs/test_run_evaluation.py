"""Evaluation on held-out problems: prompts, distribution and rewards of training, and nothing of the run moved."""

import asyncio
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.small_runs import small_config, write_yaml
from tokenizers.processors import TemplateProcessing
from transformers import Trainer

from tokencredit.collect.prompts import prompt_ids
from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.sampler import end_ids
from tokencredit.runs import evaluation, folders, processes, sampling
from tokencredit.runs.config.load import load_config
from tokencredit.runs.config.run_config import EvaluationSettings
from tokencredit.runs.data.material import Material
from tokencredit.runs.data.rewards import is_async, score
from tokencredit.runs.evaluation import evaluator, summarise
from tokencredit.runs.train import train_run

DIGITS = "0123456789+=,"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}{% if short is defined and short %},{% endif %}"
)


def chat_tokenizer() -> Any:
    """A tokenizer that adds a BOS by itself, and a template that writes one too, as Llama 3 has them."""
    tokenizer = build_tokenizer(DIGITS)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def material(**changes: Any) -> Any:
    tokenizer = build_tokenizer(DIGITS)
    base = Material(None, tokenizer, None, [lambda completions, **_: [1.0] * 99], max_response=5)
    return base._replace(**changes)


def tiny(tokenizer: Any, **shipped: Any) -> Any:
    model = build_model(tokenizer, layers=1, width=16, heads=2, seed=2)
    for name, value in shipped.items():
        setattr(model.generation_config, name, value)
    return model


def config(**changes: Any) -> EvaluationSettings:
    return EvaluationSettings.read({"every": 1, "problems": 9, "samples": 2} | changes)


def rows(*prompts: Any, **columns: Any) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), **columns})


def test_messages_get_one_bos_and_the_templates_arguments() -> None:
    tokenizer = chat_tokenizer()
    bos = tokenizer.bos_token_id
    messages = [{"role": "user", "content": "1+2"}]
    digits = [tokenizer.convert_tokens_to_ids(character) for character in "1+2=,"]
    assert prompt_ids(tokenizer, messages) == [bos, *digits[:4]]
    assert prompt_ids(tokenizer, messages, chat_template_kwargs={"short": True}) == [bos, *digits]
    assert prompt_ids(tokenizer, "1+2") == [bos, *digits[:3]]
    assert prompt_ids(tokenizer, messages) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )


def test_a_prompt_that_cannot_be_encoded_is_named() -> None:
    with pytest.raises(TokenCreditError, match=r"no token for the character 'x' \(U\+0078\)"):
        prompt_ids(build_tokenizer(DIGITS), "1+x=")
    with pytest.raises(TokenCreditError, match="has no chat template"):
        prompt_ids(build_tokenizer(DIGITS), [{"role": "user", "content": "1"}])
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokenCreditError, match="the chat template refuses a prompt: roles must alternate"):
        prompt_ids(tokenizer, [{"role": "user", "content": "1"}])


@pytest.mark.parametrize("shipped", [{"top_p": 0.01}, {"top_k": 1}, {"min_p": 0.99}, {"temperature": 0.01}])
def test_the_shipped_sampling_settings_are_not_used(shipped: dict[str, float]) -> None:
    """At temperature 1 an untrained model writes as many different texts whatever its generation_config holds."""
    given = material()
    prompts = [prompt_ids(given.tokenizer, "1+2=")]
    model = tiny(given.tokenizer, **shipped)
    with sampling.own_stream(3):
        found = sampling.sample_responses(model, given, prompts, 40)
    with sampling.own_stream(3):
        plain = sampling.sample_responses(tiny(given.tokenizer), given, prompts, 40)
    assert found == plain
    assert len({tuple(ids) for ids in found}) > 30
    assert all(getattr(model.generation_config, name) == value for name, value in shipped.items())


def test_every_end_token_ends_a_response() -> None:
    given = material(max_response=30)
    seven = given.tokenizer.convert_tokens_to_ids("7")
    model = tiny(given.tokenizer, eos_token_id=[given.tokenizer.eos_token_id, seven])
    assert end_ids(model, given.tokenizer) == [given.tokenizer.eos_token_id, seven]
    responses = sampling.sample_responses(model, given, [prompt_ids(given.tokenizer, "1=")], 30)
    assert any(ids[-1] == seven for ids in responses)
    assert all(seven not in ids[:-1] and given.tokenizer.eos_token_id not in ids[:-1] for ids in responses)


def test_a_batch_of_prompts_samples_what_single_prompts_would() -> None:
    """A response depends on its own prompt only: after padding, the probabilities are those of the prompt alone."""
    given = material(max_response=1)
    model = tiny(given.tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(40.0)  # sure of its next token, which differs between the prompts
    prompts = [prompt_ids(given.tokenizer, text) for text in ("1=", "23+45,6=", "9,")]
    together = sampling.sample_responses(model, given, prompts, 3)
    alone = [row for ids in prompts for row in sampling.sample_responses(model, given, [ids], 3)]
    with torch.no_grad():
        likely = [int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) for ids in prompts]
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 7
    assert sum(row[0] == likely[index // 3] for index, row in enumerate(together)) >= 7


# -- rewards ---------------------------------------------------------------------------------------------------------


def by_ids(completions: list, completion_ids: list, **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def by_state(completions: list, trainer_state: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    log_metric("seen", len(completions))
    log_extra("column", completions)
    return [float(trainer_state.global_step)] * len(completions)


async def later(completions: list, **_: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None, *[2.0] * (len(completions) - 1)]


class Callable_:
    def __call__(self, completions: list, answer: list, **_: Any) -> Any:
        return torch.tensor([float(value) for value in answer])


def columns(count: int = 3) -> dict[str, list]:
    return {
        "prompts": ["1="] * count,
        "completions": ["12"] * count,
        "completion_ids": [[3, 4, 1]] * count,
        "answer": ["5"] * count,
    }


def test_every_kind_of_reward_is_scored() -> None:
    # weights: 1 · length 3 + 10 · step 0 + 0.5 · (none, 2, 2) + 1 · answer 5; an unscored part adds nothing
    found = score([by_ids, by_state, later, Callable_()], [1.0, 10.0, 0.5, 1.0], columns())
    assert found.rewards == [8.0, 9.0, 9.0]
    assert found.metrics == {"seen": 3.0}
    assert score([later], [1.0], columns(2)).rewards == [None, 2.0]
    assert is_async(later) and not is_async(by_ids)


def test_async_rewards_run_inside_a_running_loop() -> None:
    async def main() -> Any:
        return score([later], [1.0], columns())

    assert asyncio.run(main()).rewards == [None, 2.0, 2.0]


class Verdict(torch.nn.Module):
    """A reward model: the number of tokens of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
        return SimpleNamespace(logits=attention_mask.sum(1, keepdim=True).float() * self.weight)


def test_a_reward_model_reads_prompt_and_completion() -> None:
    found = score([Verdict()], [2.0], columns(2), processors=[build_tokenizer(DIGITS)])
    assert found.rewards == [8.0, 8.0]  # 2 · the four characters of "1=12"


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda completions, **_: [1.0], "gave 1 rewards for 3 responses"),
        (lambda completions, **_: [math.nan] * 3, "gave nan for row 0"),
        (lambda completions, **_: [1.0, math.inf, 0.0], "gave inf for row 1"),
        (lambda completions, **_: None, "must return numbers or None"),
        (lambda completions, **_: ["good"] * 3, "must return numbers or None"),
    ],
)
def test_a_reward_that_is_not_one_number_per_response_is_refused(reward: Any, said: str) -> None:
    with pytest.raises(TokenCreditError, match=said):
        score([reward], [1.0], columns())


# -- what an evaluation says ---------------------------------------------------------------------------------------


def test_an_evaluation_by_hand() -> None:
    found = summarise([[0.0, 1.0], [3.0, None], [None, None]], threshold=0.5)
    assert found["per_problem"] == [0.5, 3.0]
    assert found["reward"] == 1.75
    assert found["per_problem_success"] == [0.5, 1.0]
    assert found["success"] == 0.75
    assert (found["unscored"], found["problems"], found["binary"]) == (3, [0, 1], False)
    assert summarise([[0.0, 1.0], [1.0, 1.0]], 0.0)["binary"]
    # the threshold decides what is right, and is itself part of the result
    strict = summarise([[0.0, 1.0], [3.0, None]], threshold=1.0)
    assert (strict["success"], strict["threshold"]) == (0.5, 1.0)
    empty = summarise([[None], [None]], 0.0)
    assert "reward" not in empty and "success" not in empty and empty["unscored"] == 2


def test_an_evaluation_counts_with_the_users_threshold() -> None:
    given = material(rewards=[by_ids], evaluation=rows("1=", "12+3="))
    model = tiny(given.tokenizer)
    low, high = (evaluator(config(threshold=value), given)(model) for value in (0.0, 5.0))
    assert high["per_problem"] == low["per_problem"]
    assert (low["success"], high["success"]) == (1.0, 0.0)  # a response has one to five tokens


def test_an_evaluation_moves_no_random_number_of_the_run() -> None:
    def noisy(completions: list, **_: Any) -> list[float]:
        return [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]

    given = material(rewards=[noisy], evaluation=rows("1="))
    evaluate, model = evaluator(config(), given), tiny(given.tokenizer)
    torch.manual_seed(5), np.random.seed(5)
    expected = (torch.rand(2).tolist(), np.random.rand())
    torch.manual_seed(5), np.random.seed(5)
    evaluate(model)
    assert (torch.rand(2).tolist(), np.random.rand()) == expected


def test_each_evaluation_draws_the_same_numbers() -> None:
    given = material(rewards=[by_ids], evaluation=rows("1=", "2="))
    evaluate, model = evaluator(config(samples=20), given), tiny(given.tokenizer)
    assert evaluate(model) == evaluate(model)


def test_pythons_generator_is_put_back() -> None:
    state = random.getstate()
    with sampling.own_stream(1):
        assert random.random() == random.Random(1).random()
    assert random.getstate() == state


def test_the_generators_of_every_gpu_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = (torch.Generator().manual_seed(3), torch.Generator().manual_seed(4))
    before = [generator.get_state() for generator in generators]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: [generator.manual_seed(seed) for generator in generators])
    with pytest.raises(KeyError), sampling.own_stream(1):
        assert [generator.initial_seed() for generator in generators] == [1, 1]
        raise KeyError
    assert all(torch.equal(each.get_state(), state) for each, state in zip(generators, before, strict=True))


def test_the_generator_of_a_pretend_gpu_is_put_back() -> None:
    fakecuda = pytest.importorskip("support.fakecuda", reason="the pretend CUDA device is not in this tree")
    fakecuda.require()
    with fakecuda.session():
        before = fakecuda.cpu(torch.rand(3, device="cuda"))
        state = torch.cuda.default_generators[0].get_state()
        with sampling.own_stream(1):
            torch.rand(5, device="cuda")
        assert torch.equal(torch.cuda.default_generators[0].get_state(), state)
        assert not torch.equal(fakecuda.cpu(torch.rand(3, device="cuda")), before)


def test_nothing_to_evaluate_on_is_no_evaluation() -> None:
    assert evaluator(config(), material(evaluation=None)) is None


def test_processes_share_the_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, three problems: each takes two, so that both make the same calls, and no problem is missing."""
    given = material(evaluation=rows("1=", "2=", "3="))
    trainer = SimpleNamespace()
    monkeypatch.setattr(evaluation, "_logged", lambda evaluate, trainer: evaluate)
    monkeypatch.setattr(processes, "size", lambda: 2)
    taken: dict[int, list] = {}

    def scored(model: Any, material: Any, problems: list, samples: int, trainer: Any) -> Any:
        taken[processes.rank()] = [problem["prompt"] for problem in problems]
        return [[float(problem["prompt"][0])] * samples for problem in problems], {}

    monkeypatch.setattr(evaluation, "_rewards", scored)
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(evaluation, "_gather", lambda values, size: [[[1.0], [3.0]], [[2.0], [1.0]]])
        found = evaluator(config(), given, trainer)(None)
        assert found["per_problem"] == [1.0, 2.0, 3.0]
    assert taken == {0: ["1=", "3="], 1: ["2=", "1="]}


def by_digits(completions: list, completion_ids: list, trainer_state: Any, **_: Any) -> list[float]:
    return [float(text.count("1")) for text in completions]


async def format_reward(completions: list, **_: Any) -> list[float | None]:
    return [None for _ in completions]


def test_a_run_evaluates_with_its_own_rewards_and_logs_to_its_trackers(
    model_folder: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    monkeypatch.syspath_prepend(str(__file__.rpartition("/")[0]))
    for name, texts in (("train", ["1+1=", "2+2=", "3+3="]), ("held_out", ["4+4=", "5+5="])):
        (tmp_path / f"{name}.json").write_text("[" + ", ".join(f'{{"prompt": "{text}"}}' for text in texts) + "]")
    logged: list[dict] = []
    log = Trainer.log
    monkeypatch.setattr(Trainer, "log", lambda self, logs, *more: logged.append(dict(logs)) or log(self, logs, *more))
    given = small_config(model_folder, steps=2) | {
        "task": None,
        "dataset": {"path": str(tmp_path / "train.json"), "evaluation": str(tmp_path / "held_out.json")},
        "reward": {"test_run_evaluation:by_digits": 2.0, "test_run_evaluation:format_reward": 1.0},
        "evaluation": {"every": 1, "samples": 4, "threshold": 1.5},
    }
    train_run(load_config(write_yaml(tmp_path / "config.yaml", given)), tmp_path / "run")
    lines = folders.read_metrics(tmp_path / "run")
    evaluations = [line["metrics"] for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]  # evaluating swallows no log
    assert len(evaluations) == 3 and all(len(found["per_problem"]) == 2 for found in evaluations)
    sent = [logs for logs in logged if "eval_reward" in logs]
    assert [logs["eval_reward"] for logs in sent] == [found["reward"] for found in evaluations]
    assert [logs["eval_success"] for logs in sent] == [found["success"] for found in evaluations]
    assert all(value % 0.5 == 0 for found in evaluations for value in found["per_problem"])  # 2 · count / 4 samples
