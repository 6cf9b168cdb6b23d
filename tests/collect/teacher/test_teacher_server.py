"""The server teacher against a loopback server of vLLM's contract, read by TRL's own client as well."""

import json
import sys
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from collect.loopback_vllm import CHAT, Loopback, serving
from test_teacher_model import ALPHABET, PROMPTS, RESPONSES, ROWS, plain, rollouts

from tokencredit.collect.teacher import server as teacher_server
from tokencredit.collect.teacher.build import Teacher, build_teacher
from tokencredit.collect.teacher.server import sampled_logprobs
from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(ALPHABET)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build_model(tokenizer, layers=1, width=32, heads=2, seed=3)


@pytest.fixture
def server(model: Any, tokenizer: Any) -> Iterator[Loopback]:
    with serving(model, tokenizer) as found:
        yield found


def teacher_of(server: Loopback, **given: Any) -> Teacher:
    return build_teacher({"kind": "server", "url": server.url, "batch_size": 2, "timeout": 20.0} | given)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_server_scores_like_the_model_behind_it(
    server: Loopback, model: Any, tokenizer: Any, temperature: float
) -> None:
    teacher = teacher_of(server)
    teacher.check(tokenizer, rows=ROWS, temperature=temperature)
    server.requests.clear()
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    got = teacher.score(prompts, ids, mask, ROWS, temperature)
    torch.testing.assert_close(got, plain(model, prompts, ids, mask, temperature), rtol=0, atol=2e-5)
    # Two requests of two rows of ids, one log-prob a token.
    assert sorted(len(request["prompt"]) for request in server.requests) == [2, 2]
    assert {request["prompt_logprobs"] for request in server.requests} == {1}
    assert all(isinstance(token, int) for request in server.requests for row in request["prompt"] for token in row)


class Session:
    """As much of a `requests` session as TRL's client uses; `requests` is not among TRL's dependencies."""

    def get(self, url: str) -> SimpleNamespace:
        return self._answer(urllib.request.Request(url))

    def post(self, url: str, json: dict[str, Any]) -> SimpleNamespace:
        return self._answer(
            urllib.request.Request(url, data=dumped(json), headers={"Content-Type": "application/json"})
        )

    def _answer(self, request: urllib.request.Request) -> SimpleNamespace:
        with urllib.request.urlopen(request) as answer:
            body = json.loads(answer.read())
        return SimpleNamespace(status_code=200, json=lambda: body)


def dumped(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def test_trls_client_reads_the_same_numbers(server: Loopback, model: Any, tokenizer: Any) -> None:
    """The contract of the loopback server is the one that TRL's client speaks."""
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient.__new__(VLLMClient)  # its constructor wants vLLM installed
    client.session, client.base_url = Session(), server.url
    client.model = client._get(f"{server.url}/v1/models")["data"][0]["id"]
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    sequences = [prompt + row[:4].tolist() for prompt, row in zip(prompts, ids, strict=True)]
    theirs = client.get_sequence_logprobs(sequences, [len(p) for p in prompts], top_logprobs=1, temperature=0.6)
    teacher = teacher_of(server)
    teacher.check(tokenizer, temperature=0.6)
    first = torch.zeros_like(mask)
    first[:, :4] = mask[:, :4]
    ours = teacher.score(prompts, ids, first, ROWS, 0.6)
    for row, values in enumerate(theirs["actual_logprobs"]):
        for column, (value,) in enumerate(values):
            if first[row, column]:
                assert float(ours[row, column]) == pytest.approx(value, abs=1e-6)


def test_a_privileged_prompt_behind_a_server(server: Loopback, model: Any, tokenizer: Any) -> None:
    teacher = teacher_of(server, template="[{answer}]{prompt}")
    teacher.check(tokenizer, rows=ROWS)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    own = [tokenizer(f"[{row['answer']}]{row['prompt']}")["input_ids"] for row in ROWS]
    torch.testing.assert_close(
        teacher.score(prompts, ids, mask, ROWS, 1.0), plain(model, own, ids, mask), rtol=0, atol=2e-5
    )


def test_a_server_that_is_away() -> None:
    teacher = build_teacher({"kind": "server", "url": "http://127.0.0.1:9"})
    with pytest.raises(TokenCreditError, match=r"no teacher at http://127.0.0.1:9/v1/models"):
        teacher.check(build_tokenizer("ab"))


def test_a_busy_server_is_asked_again(server: Loopback, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_server, "RETRY_AFTER", (0.0, 0.0))
    teacher = teacher_of(server)
    teacher.check(tokenizer)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS[:1], RESPONSES[:1])
    expected = teacher.score(prompts, ids, mask, ROWS[:1], 1.0)
    server.busy = 2
    assert torch.equal(teacher.score(prompts, ids, mask, ROWS[:1], 1.0), expected)
    server.busy = 3
    with pytest.raises(TokenCreditError, match=r'answered 503 at .*/v1/completions: {"error": "busy"}'):
        teacher.score(prompts, ids, mask, ROWS[:1], 1.0)


def test_other_vocabularies_are_refused(server: Loopback, model: Any, tokenizer: Any, tmp_path: Any) -> None:
    moved = build_tokenizer("".join(reversed(ALPHABET)))
    with pytest.raises(TokenCreditError, match=r"7 of 8 probe strings differ, first '\\n\\n': student \[2, 2\]"):
        teacher_of(server).check(moved)
    moved.save_pretrained(tmp_path)
    with pytest.raises(TokenCreditError, match="do not share a tokenizer"):
        teacher_of(server, tokenizer=str(tmp_path)).check(tokenizer)
    with pytest.raises(TokenCreditError, match="cannot load the teacher's tokenizer '/no/such'"):
        teacher_of(server, tokenizer="/no/such").check(tokenizer)
    server.can_tokenize = False
    with pytest.raises(TokenCreditError, match=r"vocabulary cannot be compared: .* answered 404") as caught:
        teacher_of(server).check(tokenizer)
    assert caught.value.hint == "name its tokenizer: `tokenizer: folder or hub name`"


def test_another_template_or_eos_of_a_named_tokenizer_is_refused(
    server: Loopback, tokenizer: Any, tmp_path: Any
) -> None:
    student, other = build_tokenizer(ALPHABET), build_tokenizer(ALPHABET)
    student.chat_template, other.chat_template = CHAT, CHAT.replace("<assistant>", "<teacher>")
    other.save_pretrained(tmp_path)
    chat = [{"prompt": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(TokenCreditError, match="prompt ids differ at position"):
        teacher_of(server, tokenizer=str(tmp_path)).check(student, rows=iter(chat))
    teacher_of(server, tokenizer=str(tmp_path), chat_template="allow").check(student, rows=chat)
    other.eos_token = "Z"
    other.save_pretrained(tmp_path)
    with pytest.raises(TokenCreditError, match="does not score the student's EOS"):
        teacher_of(server, tokenizer=str(tmp_path)).check(student)


def test_a_server_that_ignores_the_temperature_is_refused_only_when_it_matters(
    server: Loopback, tokenizer: Any
) -> None:
    server.applies_temperature = False
    with pytest.raises(TokenCreditError, match=r"samples at temperature 0.6, and the teacher's server is not known"):
        teacher_of(server).check(tokenizer, temperature=0.6)
    teacher = teacher_of(server)
    teacher.check(tokenizer)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    teacher.score(prompts, ids, mask, ROWS, 1.0)
    with pytest.raises(TokenCreditError, match="not known to apply one"):
        teacher.score(prompts, ids, mask, ROWS, 0.6)


def without(answer: dict[str, Any], row: int, position: int) -> dict[str, Any]:
    """The answer without one token's log-prob."""
    if len(answer["choices"]) > row:
        answer["choices"][row]["prompt_logprobs"][position] = None
    return answer


def test_missing_log_probs_are_an_error(server: Loopback, tokenizer: Any) -> None:
    teacher = teacher_of(server)
    teacher.check(tokenizer)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS[:2], RESPONSES[:2])
    server.spoil = lambda answer: without(answer, 0, -1)
    with pytest.raises(TokenCreditError, match="teacher returned 7 of 8 log-probs for response 0 of 2"):
        teacher.score(prompts, ids, mask, ROWS[:2], 1.0)

    def cut(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][1]["prompt_logprobs"] = answer["choices"][1]["prompt_logprobs"][:-3]
        return answer

    server.spoil = cut
    with pytest.raises(TokenCreditError, match="teacher returned 2 of 4 log-probs for response 1 of 2"):
        teacher.score(prompts, ids, mask, ROWS[:2], 1.0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda answer: {"choices": answer["choices"][:-1]}, "must answer 1 choices, got 0"),
        (lambda answer: {"choices": [{"index": 0}]}, "returned no `prompt_logprobs`, got None"),
        (lambda answer: [], "must answer a JSON object, got list"),
        (lambda answer: without(answer, 0, 2), "no log-prob for token 97"),
    ],
)
def test_answers_that_are_none(server: Loopback, tokenizer: Any, spoil: Any, message: str) -> None:
    server.spoil = spoil
    with pytest.raises(TokenCreditError, match=message):
        teacher_of(server).check(tokenizer)


def test_the_servers_length_and_name_are_read(server: Loopback, tokenizer: Any) -> None:
    server.max_model_len = 25
    teacher = teacher_of(server)
    teacher.check(tokenizer)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    teacher.score(prompts, ids, mask, ROWS, 1.0)
    server.max_model_len = 19  # 4 + 15 tokens, and the one that the server generates
    teacher = teacher_of(server)
    teacher.check(tokenizer)
    with pytest.raises(TokenCreditError, match="row 3 needs 4 prompt and 15 response tokens, the teacher takes 18"):
        teacher.score(prompts, ids, mask, ROWS, 1.0)
    with pytest.raises(TokenCreditError, match=r"serves \['tiny'\], asked for huge"):
        teacher_of(server, model="huge").check(tokenizer)


def test_answers_are_read_by_token() -> None:
    entries = [
        None,
        {"5": {"logprob": -1.0, "rank": 1}, "6": {"logprob": -2.0, "rank": 2}},
        {"9": {"logprob": -3.0}},
        {},
    ]
    # Position 1 is token 6, the second best; position 2 lacks token 7; position 3 is empty.
    values = torch.tensor(sampled_logprobs(entries, [4, 6, 7, 8], 1))
    torch.testing.assert_close(values, torch.tensor([-2.0, torch.nan, torch.nan]), equal_nan=True)


def test_the_client_needs_no_trl() -> None:
    assert "trl" not in vars(sys.modules["tokencredit.collect.teacher.server"])
