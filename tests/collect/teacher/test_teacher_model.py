"""Local teachers against a plain forward with the whole softmax, and everything that they refuse."""

import string
from typing import Any

import pytest
import torch
from collect.loopback_vllm import CHAT
from torch import Tensor

from tokencredit.collect.teacher.build import Teacher, build_teacher
from tokencredit.collect.teacher.checks import check_shift, end_warning, probe
from tokencredit.collect.teacher.prompts import TEMPLATES
from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer

ALPHABET = "".join(chr(code) for code in range(32, 127)) + "\n"
CONFIG = {"kind": "model", "model": "unused"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(ALPHABET)


@pytest.fixture(scope="module")
def chatty() -> Any:
    found = build_tokenizer(ALPHABET)
    found.chat_template = CHAT
    return found


@pytest.fixture
def policy(tokenizer: Any) -> Any:
    return build_model(tokenizer, layers=2, width=32, heads=2, seed=1)


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model on disk."""
    path = tmp_path_factory.mktemp("teacher")
    build_model(tokenizer, layers=1, width=32, heads=2, seed=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def rollouts(tokenizer: Any, prompts: list[str], responses: list[str]) -> tuple[list[list[int]], Tensor, Tensor]:
    """Prompt ids, response ids padded with junk, and the mask; "_" marks a token that an environment inserted."""
    ids = [tokenizer(text)["input_ids"] for text in responses]
    width = max(map(len, ids)) + 2
    padded = torch.tensor([row + [7] * (width - len(row)) for row in ids])
    mask = torch.zeros_like(padded, dtype=torch.bool)
    for row, text in enumerate(responses):
        mask[row, : len(text)] = torch.tensor([letter != "_" for letter in text])
    return [tokenizer(text)["input_ids"] for text in prompts], padded, mask


def plain(model: Any, prompts: list[list[int]], ids: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """The definition: one row at a time, all logits, log_softmax."""
    result = torch.zeros(ids.shape)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids[row].tolist()])).logits[0]
        logprobs = (logits.float() / temperature).log_softmax(-1)
        for column in mask[row].nonzero()[:, 0].tolist():
            result[row, column] = logprobs[len(prompt) + column - 1, ids[row, column]]
    return result


PROMPTS = ["1+1=", "what is 2+3?", "a", "1+1="]
RESPONSES = ["2, I say", "5_ok_5", "b", "three times two"]
ROWS = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, ["2", "5", "b", "2"], strict=True)]


def test_a_model_scores_like_a_plain_forward(tokenizer: Any, policy: Any, folder: str) -> None:
    teacher = build_teacher({"kind": "model", "model": folder, "batch_size": 3})
    assert isinstance(teacher, Teacher)
    teacher.check(tokenizer, policy=policy, rows=ROWS)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    for temperature in (1.0, 0.6):
        got = teacher.score(prompts, ids, mask, ROWS, temperature)
        torch.testing.assert_close(got, plain(teacher.model, prompts, ids, mask, temperature), rtol=0, atol=2e-5)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert teacher.state() == {}


@pytest.mark.parametrize("kind", ["model", "self"])
def test_entropies_come_with_the_log_probs(tokenizer: Any, policy: Any, folder: str, kind: str) -> None:
    config = {"model": {"kind": "model", "model": folder}, "self": {"kind": "self", "template": "hint:{prompt}"}}[kind]
    teacher = build_teacher(config)
    rows: list[Any] = [{"prompt": "1+1="}, {"prompt": "23"}]
    teacher.check(tokenizer, policy=policy, rows=rows)
    prompts, ids, mask = rollouts(tokenizer, ["1+1=", "23"], ["2_x", "12345"])
    logprobs, entropies = teacher.score_with_entropies(prompts, ids, mask, rows, 0.7, policy=policy)
    assert torch.equal(logprobs, teacher.score(prompts, ids, mask, rows, 0.7, policy=policy))
    model = policy if kind == "self" else teacher.model
    for row, column in mask.nonzero().tolist():
        asked = tokenizer(f"hint:{rows[row]['prompt']}")["input_ids"] if kind == "self" else prompts[row]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([asked + ids[row, :column].tolist()])).logits[0, -1]
        expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
        assert float(entropies[row, column]) == pytest.approx(float(expected), abs=1e-5)
    assert bool((entropies[~mask] == 0.0).all())


def test_empty_responses_score_nothing(tokenizer: Any, folder: str) -> None:
    teacher = build_teacher({"kind": "model", "model": folder})
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    mask[1] = False
    got = teacher.score(prompts, ids, mask, ROWS, 1.0)
    torch.testing.assert_close(got, plain(teacher.model, prompts, ids, mask), rtol=0, atol=2e-5)
    assert not got[1].any()
    assert not teacher.score(prompts, ids, torch.zeros_like(mask), ROWS, 1.0).any()


def test_the_same_prompt_and_live_weights_are_the_student(tokenizer: Any, policy: Any) -> None:
    teacher = build_teacher({"kind": "self", "template": "{prompt}"})
    teacher.check(tokenizer, rows=ROWS)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    gap = teacher.score(prompts, ids, mask, ROWS, 1.0, policy) - plain(policy, prompts, ids, mask)
    assert float(gap.abs().max()) < 1e-4


def test_privilege_goes_in_front_of_a_plain_prompt(tokenizer: Any, policy: Any) -> None:
    teacher = build_teacher({"kind": "self", "template": "hint"} | {"columns": {"hint": "answer"}})
    teacher.check(tokenizer, rows=ROWS)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    own = [tokenizer(f"A hint: {row['answer']}\n\n{row['prompt']}")["input_ids"] for row in ROWS]
    got = teacher.score(prompts, ids, mask, ROWS, 1.0, policy)
    torch.testing.assert_close(got, plain(policy, own, ids, mask), rtol=0, atol=2e-5)


def test_a_template_with_prompt_is_the_whole_prompt(tokenizer: Any, policy: Any) -> None:
    teacher = build_teacher({"kind": "self", "template": "[{answer}]{prompt}"})
    teacher.check(tokenizer, rows=ROWS)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    own = [tokenizer(f"[{row['answer']}]{row['prompt']}")["input_ids"] for row in ROWS]
    torch.testing.assert_close(
        teacher.score(prompts, ids, mask, ROWS, 1.0, policy), plain(policy, own, ids, mask), rtol=0, atol=2e-5
    )


def chat_rows() -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in ROWS]


def test_privilege_goes_into_the_last_user_turn_of_a_chat(chatty: Any, policy: Any) -> None:
    rows = chat_rows()
    teacher = build_teacher({"kind": "self", "template": "answer"})
    teacher.check(chatty, rows=rows)
    prompts = [chatty(f"<user>{text}\n<assistant>")["input_ids"] for text in PROMPTS]
    _, ids, mask = rollouts(chatty, PROMPTS, RESPONSES)
    text = TEMPLATES["answer"].format(answer="5")
    assert text.endswith("with \\boxed{}.")
    own = chatty(f"<user>what is 2+3?\n\n{text}\n<assistant>")["input_ids"]
    got = teacher.score(prompts, ids, mask, rows, 1.0, policy)
    torch.testing.assert_close(got[1:2], plain(policy, [own], ids[1:2], mask[1:2]), rtol=0, atol=2e-5)


def test_another_rendering_of_the_students_prompt_is_refused(chatty: Any, policy: Any) -> None:
    rows = chat_rows()
    teacher = build_teacher({"kind": "self", "template": "answer", "chat_template_kwargs": {"think": True}})
    teacher.check(chatty, rows=rows)
    prompts = [chatty(f"<user>{text}\n<assistant>!")["input_ids"] for text in PROMPTS]
    _, ids, mask = rollouts(chatty, PROMPTS, RESPONSES)
    with pytest.raises(TokenCreditError, match=r"prompt ids differ at position 22 of 23: student '!', teacher '\?'"):
        teacher.score(prompts, ids, mask, rows, 1.0, policy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "`teacher` is a mapping with `kind`"),
        ({"kind": "modle"}, "did you mean 'model'"),
        ({"kind": "model", "model": "x", "divice": "cpu"}, "did you mean 'device'"),
        ({"kind": "model"}, "teacher 'model' needs `model`"),
        ({"kind": "self"}, "is the student: its log-ratio is 0 everywhere"),
        ({"kind": "self", "template": "anser"}, "did you mean 'answer'"),
        ({"kind": "self", "template": "answer", "weights": "old"}, "must be one of"),
        ({"kind": "self", "template": "answer", "ema_rate": 0}, r"must be in \(0, 1\], got 0"),
        ({"kind": "self", "template": "answer", "columns": {"trace": "x"}}, "unknown field in `columns`"),
        ({"kind": "self", "template": "{answer.x}"}, "a column's name"),
        ({"kind": "self", "template": "{answer"}, "cannot read the teacher's template"),
        ({"kind": "base", "batch_size": 0}, "whole number of at least 1, got 0"),
        ({"kind": "server", "url": "ftp://x"}, "must start with http"),
        ({"kind": "server", "url": "http://x", "timeout": 0}, "seconds above 0"),
        ({"kind": "model", "model": "/no/such/folder"}, "cannot load the teacher '/no/such/folder'"),
    ],
)
def test_configs_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        build_teacher(config)


def model_teacher(model: Any, tokenizer: Any, **given: Any) -> Any:
    from tokencredit.collect.teacher.build import resolve_teacher
    from tokencredit.collect.teacher.model import ModelTeacher

    return ModelTeacher(model, tokenizer, resolve_teacher(CONFIG | given))


def test_other_vocabularies_are_refused(tokenizer: Any, policy: Any) -> None:
    moved = build_tokenizer("".join(reversed(ALPHABET)))
    with pytest.raises(
        TokenCreditError, match=r"do not share a tokenizer: 7 of 8 probe strings differ, first '\\n\\n': student"
    ):
        model_teacher(policy, moved).check(tokenizer)
    # The probes do not see "~": the vocabulary does.
    rare = build_tokenizer(ALPHABET.replace("~", "€"))
    with pytest.raises(TokenCreditError, match=r"1 of 98 tokens differ, first '~': student 96, teacher none"):
        model_teacher(policy, rare).check(tokenizer)


def test_more_rows_and_more_tokens_than_the_student_has_are_fine(tokenizer: Any) -> None:
    wider = build_tokenizer(ALPHABET + "€")
    teacher = build_model(wider, layers=1, width=32, heads=2)
    teacher.resize_token_embeddings(128, mean_resizing=False)
    model_teacher(teacher, wider).check(tokenizer)
    teacher.resize_token_embeddings(90, mean_resizing=False)
    with pytest.raises(TokenCreditError, match="ids up to 97, the teacher's vocabulary 90 rows"):
        model_teacher(teacher, wider).check(tokenizer)


def test_tokens_that_decode_otherwise_are_refused(tokenizer: Any, policy: Any) -> None:
    other = build_tokenizer(ALPHABET)
    decode = other.decode
    other.decode = lambda ids, **options: decode(ids, **options).replace("A", "Α")
    with pytest.raises(TokenCreditError, match="token 35 decodes to 'A' for the student and to 'Α' for the teacher"):
        model_teacher(policy, other).check(tokenizer)


def test_another_eos_is_refused(tokenizer: Any, policy: Any) -> None:
    other = build_tokenizer(ALPHABET)
    other.eos_token = "Z"
    policy.generation_config.eos_token_id = None
    teacher = model_teacher(policy, other)
    with pytest.raises(TokenCreditError, match=r"the student ends with '<eos>' \(1\), the teacher with 'Z' \(60\)"):
        teacher.check(tokenizer)
    model_teacher(policy, other, eos="allow").check(tokenizer)
    # A list of ends that holds the student's is fine.
    policy.generation_config.eos_token_id = [60, 1]
    teacher.check(tokenizer)


def test_another_chat_template_is_refused(tokenizer: Any, chatty: Any, policy: Any) -> None:
    other = build_tokenizer(ALPHABET)
    other.chat_template = CHAT.replace("<assistant>", "<teacher>")
    with pytest.raises(TokenCreditError, match="prompt ids differ at position 12 of 22: student 'a', teacher 't'"):
        model_teacher(policy, other).check(chatty, rows=chat_rows())
    model_teacher(policy, other, chat_template="allow").check(chatty, rows=chat_rows())
    model_teacher(policy, other).check(chatty, rows=ROWS)


@pytest.mark.parametrize("gone", [None, "", "  "])
def test_a_privileged_prompt_without_an_answer_is_refused_at_the_start(tokenizer: Any, gone: Any) -> None:
    rows = [*ROWS, {"prompt": "x", "answer": gone, "solution": "1"}]
    teacher = build_teacher({"kind": "self", "template": "answer"})
    with pytest.raises(
        TokenCreditError, match=r"row 4 has no `answer` for the teacher's prompt.*answer, prompt, solution"
    ):
        teacher.check(tokenizer, rows=rows)
    with pytest.raises(TokenCreditError, match="row 0 has no `solution`"):
        build_teacher({"kind": "self", "template": "answer", "columns": {"answer": "solution"}}).check(
            tokenizer, rows=rows
        )


def test_prompts_that_end_otherwise_are_refused(tokenizer: Any, chatty: Any) -> None:
    with pytest.raises(TokenCreditError, match="must end like the student's: student '=', teacher '2'"):
        build_teacher({"kind": "self", "template": "{prompt}{answer}"}).check(tokenizer, rows=ROWS)
    with pytest.raises(TokenCreditError, match="is for plain prompts"):
        build_teacher({"kind": "self", "template": "{answer}{prompt}"}).check(chatty, rows=chat_rows())
    with pytest.raises(TokenCreditError, match="no token for the character"):
        build_teacher({"kind": "self", "template": "ä{prompt}"}).check(tokenizer, rows=ROWS)


def test_prompts_that_do_not_fit_are_refused(tokenizer: Any, policy: Any) -> None:
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    fits = build_teacher(
        {"kind": "self", "template": "{answer}!{prompt}", "max_length": 21}
    )  # 6 + 15 in the longest row
    fits.check(tokenizer, rows=ROWS)
    fits.score(prompts, ids, mask, ROWS, 1.0, policy)
    short = build_teacher({"kind": "self", "template": "{answer}!{prompt}", "max_length": 20})
    short.check(tokenizer, rows=ROWS)
    with pytest.raises(TokenCreditError, match="row 3 needs 6 prompt and 15 response tokens, the teacher takes 20"):
        short.score(prompts, ids, mask, ROWS, 1.0, policy)


def test_decoys_are_answers_of_other_problems(tokenizer: Any) -> None:
    teacher = build_teacher({"kind": "self", "template": "decoy"})
    teacher.check(tokenizer, rows=ROWS)
    prompts = teacher.prompts.prompts(ROWS, [tokenizer(text)["input_ids"] for text in PROMPTS], tokenizer)
    for row, ids in zip(ROWS, prompts, strict=True):
        shown = tokenizer.decode(ids).removeprefix("The final answer is known to be ")[0]
        assert shown != row["answer"]
        assert shown in {"2", "5", "b"}
    with pytest.raises(TokenCreditError, match="the decoy needs another answer than '2'"):
        build_teacher({"kind": "self", "template": "decoy"}).check(tokenizer, rows=ROWS[:1])


def test_siblings(tokenizer: Any, policy: Any) -> None:
    teacher = build_teacher({"kind": "self", "template": "sibling"})
    assert teacher.needs_attempts
    teacher.check(tokenizer, rows=ROWS)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    rows = [{**row, "attempt": attempt} for row, attempt in zip(ROWS, [None, "9", None, "7"], strict=True)]
    gap = teacher.score(prompts, ids, mask, rows, 1.0, policy) - plain(policy, prompts, ids, mask)
    assert float(gap[0].abs().max()) < 1e-4  # without a sibling the teacher sees what the student saw
    assert float(gap[1].abs().max()) > 1e-3


def nudge(policy: Any, by: float) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
                )


@pytest.mark.parametrize("weights", ["frozen", "ema"])
def test_other_weights(tokenizer: Any, policy: Any, weights: str) -> None:
    teacher = build_teacher({"kind": "self", "weights": weights, "ema_rate": 0.25})
    teacher.check(tokenizer, policy=policy)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    first = teacher.score(prompts, ids, mask, ROWS, 1.0, policy)
    torch.testing.assert_close(first, plain(policy, prompts, ids, mask), rtol=0, atol=2e-5)
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.train()
    nudge(policy, 0.3)
    moved = {name: value.clone() for name, value in policy.state_dict().items()}
    teacher.after_step(policy)
    later = teacher.score(prompts, ids, mask, ROWS, 1.0, policy)
    assert policy.training
    for name, value in policy.state_dict().items():
        assert torch.equal(value, moved[name])
    rate = 0.25 if weights == "ema" else 0.0
    expected = build_model(tokenizer, layers=2, width=32, heads=2)
    expected.load_state_dict({name: start[name] + rate * (moved[name] - start[name]) for name in start})
    torch.testing.assert_close(later, plain(expected, prompts, ids, mask), rtol=0, atol=5e-5)
    # A resumed run has the same teacher, whatever the policy is by then.
    resumed = build_teacher({"kind": "self", "weights": weights, "ema_rate": 0.25})
    resumed.load_state(teacher.state())
    assert torch.equal(resumed.score(prompts, ids, mask, ROWS, 1.0, policy), later)
    other = build_model(tokenizer, layers=1, width=32, heads=2)
    with pytest.raises(TokenCreditError, match="parameters of another policy"):
        resumed.score(prompts, ids, mask, ROWS, 1.0, other)


def test_the_adapter_off_is_the_base(tokenizer: Any, policy: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = build_model(tokenizer, layers=2, width=32, heads=2, seed=1)  # the same weights
    student = get_peft_model(policy, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    nudge(student, 0.5)
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    for config in ({"kind": "base"}, {"kind": "self", "weights": "base"}):
        teacher = build_teacher(config)
        teacher.check(tokenizer, policy=student)
        got = teacher.score(prompts, ids, mask, ROWS, 1.0, student)
        torch.testing.assert_close(got, plain(base, prompts, ids, mask), rtol=0, atol=2e-5)
        assert teacher.state() == {}  # no memory of its own
    live = build_teacher({"kind": "self", "template": "{prompt}"})
    live.check(tokenizer, rows=ROWS)
    student.train()
    with_adapter = live.score(prompts, ids, mask, ROWS, 1.0, student)
    assert torch.equal(with_adapter, live.score(prompts, ids, mask, ROWS, 1.0, student))  # no dropout inside
    assert float((with_adapter - got).abs().max()) > 1e-2
    frozen = build_teacher({"kind": "self", "weights": "frozen"})
    frozen.score(prompts, ids, mask, ROWS, 1.0, student)
    assert all("lora" in name for name in frozen.state())
    with pytest.raises(TokenCreditError, match="has no adapter"):
        build_teacher({"kind": "base"}).check(tokenizer, policy=base)


def test_scoring_draws_no_random_number_and_leaves_no_gradient(tokenizer: Any, policy: Any) -> None:
    teacher = build_teacher({"kind": "self", "template": "{answer}{prompt}"})
    teacher.check(tokenizer, rows=ROWS)
    before = torch.get_rng_state()
    prompts, ids, mask = rollouts(tokenizer, PROMPTS, RESPONSES)
    teacher.score(prompts, ids, mask, ROWS, 1.0, policy)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_probe_reports_and_refuses(tokenizer: Any, policy: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    student = -torch.rand(8, 20, generator=generator)
    mask = torch.ones_like(student, dtype=torch.bool)
    ids = torch.full((8, 20), 5)
    ids[:, -1] = 1
    teacher = student - 0.1
    report = probe(lambda: teacher, ids, mask, student, ends=[1])
    assert report.repeat_max == 0.0
    assert report.gap_mean == pytest.approx(-0.1, abs=1e-6)
    assert report.end_gap == pytest.approx(-0.1, abs=1e-6)
    assert report.warnings == (
        "the teacher's log-ratio has one sign on all tokens: it looks like a divergence, not a log-ratio",
    )
    mixed = teacher + 0.2 * (torch.arange(20) % 2)
    assert probe(lambda: mixed, ids, mask, student).warnings == ()
    noisy = iter((teacher, teacher + 0.05))
    assert "0.050 nats apart" in probe(lambda: next(noisy), ids, mask, student).warnings[-1]
    worse = iter((teacher, teacher + 0.3))
    with pytest.raises(TokenCreditError, match=r"0\.300 nats apart on average, at most 0.2"):
        probe(lambda: next(worse), ids, mask, student)
    unlikely = teacher.clone()
    unlikely[:, -1] -= 9
    assert "lengths will grow" in probe(lambda: unlikely, ids, mask, student, ends=[1]).warnings[0]
    assert end_warning(unlikely - student, ids, mask, [2]) == (None, "")


@pytest.mark.parametrize("by", [1, -1])
def test_off_by_one_is_found(by: int) -> None:
    student = -torch.rand(4, 30, generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(student, dtype=torch.bool)
    check_shift(student + 0.3, student, mask)
    with pytest.raises(TokenCreditError, match=f"when shifted by {by}: mean"):
        check_shift(student.roll(-by, 1), student, mask)
    check_shift(student.roll(-by, 1)[:, :9], student[:, :9], mask[:, :9])  # too few tokens to tell


def test_every_template_is_made_of_plain_fields() -> None:
    for name, text in TEMPLATES.items():
        fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
        assert fields <= {"answer", "trace", "attempt", "hint", "feedback"}, name
