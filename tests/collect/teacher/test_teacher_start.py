"""What is looked at before and at the first batch: ends, streams, templates, types, and the first scores."""

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from collect.loopback_vllm import CHAT, Loopback, serving
from test_teacher_model import ALPHABET, PROMPTS, RESPONSES, rollouts

from tokencredit.collect.teacher.build import build_teacher, resolve_teacher
from tokencredit.collect.teacher.checks import check_end
from tokencredit.collect.teacher.prompts import (
    CHECKED,
    STREAMED,
    PromptRenderer,
    _generation_suffix,
    first_rows,
    render,
)
from tokencredit.collect.teacher.server import sampled_logprobs
from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.teachers import with_lab_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(ALPHABET)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("teacher")
    build_model(tokenizer, layers=1, width=32, heads=2, seed=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# -- ends ------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "passes"),
    [
        ([7, 7, 5], [7, 5], True),  # two chat models
        ([7, 7, 5], [7], True),
        ([7, 7, 5], [5, 5], False),  # a chat student, a base teacher: 5 is only in the student's list
        ([5, 5], [7, 7], False),
        ([5], [7, 5], True),  # the student ends with 5 although its tokenizer says 7
        ([7, 7], [], True),  # nothing is known of the teacher
    ],
)
def test_the_teacher_must_know_the_eos_of_the_student(student: list[int], teacher: list[int], passes: bool) -> None:
    tokenizer = SimpleNamespace(eos_token_id=7, decode=lambda ids: f"<{ids[0]}>")
    if passes:
        check_end(student, teacher, tokenizer)
        return
    with pytest.raises(TokenCreditError, match="does not score the student's EOS"):
        check_end(student, teacher, tokenizer)
    check_end(student, teacher, tokenizer, "allow")


# -- rows and templates ------------------------------------------------------------


class Counted:
    """Rows without end, or as many as `len` says, that are counted as they are read."""

    def __init__(self, length: int | None) -> None:
        self.read = 0
        if length is not None:
            type(self).__len__ = lambda self: length  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in itertools.count():
            self.read += 1
            yield {"prompt": f"{number}=", "answer": str(number)}


def test_a_stream_is_not_read_to_its_end(tokenizer: Any, folder: str) -> None:
    for config in (
        {"kind": "self", "template": "{answer}:{prompt}"},
        {"kind": "model", "model": folder, "template": "decoy"},
    ):
        rows = Counted(None)
        build_teacher(config).check(tokenizer, rows=rows)
        assert rows.read <= 2 * STREAMED + 8
    assert len(first_rows(iter(({"prompt": "1"},) * 3))) == 3


def test_a_long_set_is_read_in_part() -> None:
    rows = [{"prompt": "1"}] * (CHECKED + 5)
    assert len(first_rows(rows)) == CHECKED


def renderer(**given: Any) -> PromptRenderer:
    return PromptRenderer({"template": "answer", "columns": {}, "chat_template_kwargs": {}, "max_length": None} | given)


def test_the_ending_is_found_where_a_template_rewrites_what_comes_before(tokenizer: Any) -> None:
    talk = [{"role": "user", "content": "2+3"}]
    chat = build_tokenizer(ALPHABET)
    chat.chat_template = CHAT
    assert _generation_suffix(talk, chat, renderer()) == len("<assistant>")
    # Without a generation prompt this template closes the conversation: the renderings have one length.
    ends = "{% if add_generation_prompt %}go>{% else %}end{% endif %}"
    chat.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}" + ends
    assert len(render(talk, chat, {})) == len(render(talk, chat, {}, False))
    assert _generation_suffix(talk, chat, renderer()) == len("]go>")
    renderer().check([{"prompt": talk, "answer": "5"}], chat)


def test_a_template_that_refuses_is_one_line(tokenizer: Any) -> None:
    chat = build_tokenizer(ALPHABET)
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokenCreditError, match=r"refuses a prompt: .*roles must alternate"):
        render([{"role": "user", "content": "1"}], chat, {})


# -- configs ------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        1,
        "self",
        {},
        {"kind": {}},
        {"kind": ["self"]},
        {"kind": None},
        {"kind": "self", 3: 4},
        {"kind": "self", "template": {"a": 1}},
        {"kind": "self", "template": "answer", "columns": ["answer"]},
        {"kind": "self", "template": "answer", "columns": {"answer": 3}},
        {"kind": "self", "weights": []},
        {"kind": "self", "ema_rate": True},
        {"kind": "self", "max_length": "long"},
        {"kind": "base", "batch_size": 2.5},
        {"kind": "model", "model": 7},
        {"kind": "model", "model": "x", "trust_remote_code": "no"},
        {"kind": "server", "url": 8000},
        {"kind": "server", "url": "http://x", "timeout": math.inf},
        {"kind": "server", "url": "http://x", "timeout": math.nan},
    ],
)
def test_a_config_of_the_wrong_type_is_one_line(config: Any) -> None:
    with pytest.raises(TokenCreditError):
        resolve_teacher(config)


@pytest.mark.parametrize("section", [1, "self", ["kind"]])
def test_a_section_that_is_no_mapping_is_one_line(section: Any) -> None:
    with pytest.raises(TokenCreditError, match="`teacher` must be a mapping"):
        with_lab_model(section, "chain")


# -- servers ------------------------------------------------------------


def entries(value: Any) -> list[Any]:
    return [None, {"4": {"logprob": -0.5}}, {"5": {"logprob": value}}]


@pytest.mark.parametrize("value", [-9999.0, -1e9, -math.inf, 0.5, math.inf])
def test_placeholders_are_no_log_probs(value: float) -> None:
    with pytest.raises(TokenCreditError, match="gives token 5 the log-prob"):
        sampled_logprobs(entries(value), [3, 4, 5], 1)


@pytest.mark.parametrize("value", [None, "−1", True, math.nan, {}])
def test_what_is_not_a_number_is_missing(value: Any) -> None:
    found = sampled_logprobs(entries(value), [3, 4, 5], 1)
    assert found[0] == -0.5 and math.isnan(found[1])
    assert math.isnan(sampled_logprobs([None, [1], 3], [3, 4, 5], 1)[0])


def test_a_servers_own_sampling_settings_do_not_reach_the_scores(tokenizer: Any) -> None:
    model = build_model(tokenizer, layers=1, width=32, heads=2, seed=3)
    with serving(model, tokenizer) as server:
        teacher = build_teacher({"kind": "server", "url": server.url})
        prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
        teacher.check(tokenizer)
        teacher.score(prompts, ids, mask, [{}] * 4, 1.0)
        wanted = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        assert wanted.items() <= server.requests[-1].items()
        server.spoil = lambda answer: _spoiled(answer)
        with pytest.raises(TokenCreditError, match="-9999") as refusal:
            teacher.score(prompts, ids, mask, [{}] * 4, 1.0)
        assert "top_k" in str(refusal.value)


def _spoiled(answer: Any) -> Any:
    for entry in answer["choices"][0]["prompt_logprobs"][-1].values():
        entry["logprob"] = -9999.0
    return answer


def test_the_remedy_for_a_temperature_helps(tokenizer: Any) -> None:
    model = build_model(tokenizer, layers=1, width=32, heads=2, seed=3)
    with serving(model, tokenizer) as server:
        server.applies_temperature = False
        with pytest.raises(TokenCreditError) as refusal:
            build_teacher({"kind": "server", "url": server.url}).check(tokenizer, temperature=0.7)
    assert "temperature 1.0" in str(refusal.value) and "kind: model" in str(refusal.value)


# -- the first scores ------------------------------------------------------------


def long_rollouts(tokenizer: Any) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (4, 40), generator=generator)
    return [tokenizer(text)["input_ids"] for text in PROMPTS], ids, torch.ones_like(ids, dtype=torch.bool)


def sharp(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


def test_the_first_batch_is_probed_once(tokenizer: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = sharp(build_model(tokenizer, layers=2, width=32, heads=2, seed=1))
    teacher = build_teacher({"kind": "model", "model": folder})
    teacher.check(tokenizer, policy=policy)
    prompts, ids, mask = long_rollouts(tokenizer)
    teacher.score(prompts, ids, mask, [{}] * 4, 1.0)  # nobody to compare with
    assert teacher._start.report is None
    calls: list[int] = []
    handle = policy.register_forward_hook(lambda *args: calls.append(1))
    for _ in range(2):
        teacher.score(prompts, ids, mask, [{}] * 4, 1.0, policy=policy)
    handle.remove()
    report = teacher._start.report
    assert report is not None and report.repeat_max == 0.0


def test_scores_that_are_off_by_one_are_refused(tokenizer: Any) -> None:
    policy = sharp(build_model(tokenizer, layers=2, width=32, heads=2, seed=1))

    def shifted(answer: Any) -> Any:
        for choice in answer["choices"]:
            values = [next(iter(entry.values()))["logprob"] if entry else None for entry in _of(choice)]
            for entry, value in zip(_of(choice)[2:], values[1:], strict=False):
                for shown in entry.values():
                    shown["logprob"] = value
        return answer

    with serving(policy, tokenizer) as server:
        server.completions = _sampled_only(server)  # type: ignore[method-assign]
        teacher = build_teacher({"kind": "server", "url": server.url})
        teacher.check(tokenizer, policy=policy)
        server.spoil = shifted
        prompts, ids, mask = long_rollouts(tokenizer)
        with pytest.raises(TokenCreditError, match="when shifted by"):
            teacher.score(prompts, ids, mask, [{}] * 4, 1.0, policy=policy)


def _of(choice: Any) -> Any:
    return choice["prompt_logprobs"]


def _sampled_only(server: Loopback) -> Any:
    """Answers with the log-prob of the given token only, so that there is one number per place."""
    original = server.completions

    def completions(request: dict[str, Any]) -> dict[str, Any]:
        spoil, server.spoil = server.spoil, lambda answer: answer
        answer = original(request)
        server.spoil = spoil
        for choice, ids in zip(answer["choices"], request["prompt"], strict=True):
            choice["prompt_logprobs"] = [None] + [
                {str(token): entry[str(token)]}
                for token, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
            ]
        return spoil(answer)

    return completions


def test_a_teacher_that_does_not_repeat_itself_is_refused(tokenizer: Any, folder: str) -> None:
    policy = build_model(tokenizer, layers=2, width=32, heads=2, seed=1)
    teacher = build_teacher({"kind": "model", "model": folder})
    teacher.check(tokenizer, policy=policy)
    calls = itertools.count()

    def drift(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * (1.0 + 3.0 * next(calls))
        return output

    sharp(teacher.model)
    teacher.score(*long_rollouts(tokenizer), [{}] * 4, 1.0)  # the head is compared first
    teacher.model.model.register_forward_hook(drift)
    with pytest.raises(TokenCreditError, match=r"scores the same tokens .* nats apart"):
        teacher.score(*long_rollouts(tokenizer), [{}] * 4, 1.0, policy=policy)
