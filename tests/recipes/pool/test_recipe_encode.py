"""The mask of a conversation holds the assistant's answers, whatever the chat template does with the rest."""

import json
from pathlib import Path

import numpy as np
import pytest
import trl

from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.recipes.pool.encode import Unread, bos_of, encode, encode_all, encode_prompt
from tokencredit.recipes.pool.ingest import canonicalise
from tokencredit.recipes.signals.computation import Sources, compute
from tokencredit.recipes.signals.forward import Scorer, score_samples
from tokencredit.recipes.signals.store import load_materials

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))


def tokenizer_with(template: str):
    tokenizer = build_tokenizer(ALPHABET)
    tokenizer.chat_template = template
    return tokenizer


def turn(role: str, content: str, **keys) -> dict:
    return {"role": role, "content": content, **keys}


TALK = [turn("user", "2+2?"), turn("assistant", "<think>two</think>four"), turn("user", "3?"), turn("assistant", "six")]
BODY = "{{ '<' + m.role + '>' + m.content + '#\n' }}"
PLAIN = "{% for m in messages %}" + BODY + "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
# earlier thinking goes as soon as another user turn follows
DROPS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{% if loop.index0 < ns.last %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<' + m.role + '>' + c + '#\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
OPENS = DROPS.replace("{{ '<assistant>' }}", "{{ '<assistant><think>' }}")  # history lacks the block
CLOSES = PLAIN.replace("{% if add", "{{ 'EOT' }}{% if add")  # something after the last message of any rendering
WHOLE = "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}" + PLAIN
COUNTED = "{{ messages | length }} messages\n" + PLAIN  # no rendering of a part is a part of the whole
TRIMS = PLAIN.replace("m.content", "(m.content | trim)")
MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '#' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '#\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
KEPT = ["<think>two</think>four#\n", "six#\n"]
TEMPLATES = {
    "plain": (PLAIN, KEPT),
    "earlier thinking dropped": (DROPS, ["four#\n", "six#\n"]),
    "prompt opens a block": (OPENS, ["four#\n", "six#\n"]),
    "refuses a prompt": (WHOLE, KEPT),
    "counts its messages": (COUNTED, KEPT),
    "trims": (TRIMS, KEPT),
    "generation marks": (MARKED, ["<think>two</think>four#", "six#"]),
    "closes every rendering": (CLOSES, ["<think>two</think>four#\n", "six#\nEOT"]),
}


def answers(tokenizer, messages, **options) -> list[str]:
    encoded = encode(tokenizer, messages, 4096, **options)
    text = tokenizer.apply_chat_template(messages, tools=options.get("tools"), tokenize=False)
    assert encoded.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert int(encoded.mask.sum()) == sum(stop - start for start, stop in encoded.spans)
    return [tokenizer.decode(encoded.ids[start:stop]) for start, stop in encoded.spans]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_holds_the_answers(name: str) -> None:
    template, expected = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    assert answers(tokenizer, TALK) == expected
    three = [*TALK, turn("user", "and 4?"), turn("assistant", "<b>ten</b>")]
    assert [text[:3] for text in answers(tokenizer, three)] == [expected[0][:3], "six", "<b>"]
    assert answers(tokenizer, [turn("system", "be brief"), *TALK]) == expected


def test_a_public_template_with_thinking_and_tools() -> None:
    path = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer = tokenizer_with(path.read_text())
    talk = [
        turn("user", "weather?"),
        turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": "w", "arguments": {"c": "Rome"}}}]),
        turn("tool", "sunny"),
        turn("assistant", "It is sunny.", reasoning_content="so it is"),
    ]
    call = '<tool_call>\n{"name": "w", "arguments": {"c": "Rome"}}\n</tool_call><|im_end|>\n'
    last = "<think>\nso it is\n</think>\n\nIt is sunny.<|im_end|>\n"
    assert answers(tokenizer, talk, tools=[{"type": "function", "function": {"name": "w"}}]) == [call, last]
    assert answers(tokenizer, [*TALK[:3], turn("assistant", "six")])[0] == "four<|im_end|>\n"


@pytest.mark.parametrize("key", [{"train": False}, {"weight": 0}, {"training": False}])
@pytest.mark.parametrize("template", [PLAIN, MARKED, None])
def test_an_answer_of_weight_zero_is_read_and_not_trained(template: str | None, key: dict) -> None:
    tokenizer = tokenizer_with(template)
    talk = [TALK[0], {**TALK[1], **key}, *TALK[2:]]
    encoded = encode(tokenizer, talk, 4096)
    assert [tokenizer.decode(encoded.ids[a:b]).startswith("six") for a, b in encoded.spans] == [True]
    assert "four" in tokenizer.decode(encoded.ids)


ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + PLAIN
)


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (ALTERNATE, [turn("system", "s"), *TALK[:2]], "roles must alternate"),
        (PLAIN, TALK[1:], "its first message is the assistant's"),
        (PLAIN + "{% if messages | length == 3 %}{{ 'a' + 1 }}{% endif %}", [turn("system", "s"), *TALK[:2]], "int"),
        (PLAIN.replace("in messages", "in messages | reverse"), TALK, "is not found"),
        (PLAIN, [turn("user", "q"), turn("assistant", "lone \ud800")], ""),
        (None, [turn("user", "q"), turn("assistant", "naïve")], ""),  # no such character in this vocabulary
        (None, [turn("user", "q"), turn("assistant", "a", tool_calls=[{"x": 1}])], "tool_calls"),
    ],
)
def test_a_refused_sample_is_named_or_skipped(template: str | None, messages: list, reason: str) -> None:
    tokenizer = tokenizer_with(template)
    with pytest.raises(TokenCreditError, match="sample abc123 cannot be encoded") as caught:
        encode(tokenizer, messages, 512, name="abc123")
    assert reason in caught.value.message and "\n" not in caught.value.message
    unread: list[Unread] = []
    good, bad = encode_all(tokenizer, [TALK[-2:], {"id": "x", "messages": messages}], 512, unread)
    assert good.ids and not bad.ids
    assert [item.name for item in unread] == ["x"]


def test_a_refused_prompt_is_one_line() -> None:
    with pytest.raises(TokenCreditError, match="the prompt 'hi' cannot be encoded: never"):
        encode_prompt(tokenizer_with("{{ raise_exception('never') }}"), "hi")


def test_skipped_samples_have_no_signals_and_are_counted(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(ALTERNATE)
    build_model(tokenizer, layers=1, width=16, heads=2, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    talks = [TALK[:2], [turn("assistant", "hello"), *TALK[:2]], [turn("user", "b"), turn("assistant", "c")]]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    pool, _ = canonicalise([tmp_path / "raw.jsonl"], tmp_path / "pool")
    sources = Sources(model=str(tmp_path / "model"))
    with pytest.raises(TokenCreditError, match=f"sample {pool.ids[1].decode()} cannot be encoded"):
        compute(tmp_path / "pool", pool, ["ppl"], sources)
    lenient = Sources(model=str(tmp_path / "model"), skip_bad=True)
    compute(tmp_path / "pool", pool, ["ppl", "rds"], lenient)
    assert [item.name for item in lenient.unread] == [pool.ids[1].decode()]
    materials = load_materials(tmp_path / "pool")
    assert np.isnan(materials.column("ppl")).tolist() == [False, True, False]
    assert (np.linalg.norm(materials.features, axis=1) > 0).tolist() == [True, False, True]


def test_ifd_reads_the_response_alone_behind_bos() -> None:
    tokenizer = tokenizer_with("{{ bos_token }}" + PLAIN)
    tokenizer.add_special_tokens({"bos_token": "@"})
    model = build_model(tokenizer, layers=1, width=16, heads=2, seed=0)
    assert bos_of(tokenizer) == []  # it names a BOS and writes none, as SmolLM2's does
    scorer = Scorer(model=model, tokenizer=tokenizer, name="m", revision="r")
    without = score_samples(scorer, [TALK[-2:]])[0]["ifd"][0]
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="@ $A", special_tokens=[("@", bos)])
    assert bos_of(tokenizer) == [bos]
    found = score_samples(scorer, [TALK[-2:]])[0]["ifd"][0]
    encoded = encode(tokenizer, TALK[-2:], 512)
    ((start, stop),) = encoded.spans
    losses = [losses_of(model, encoded.ids)[start:stop], losses_of(model, [bos, *encoded.ids[start:stop]])[1:]]
    ratio = losses[0][1:].mean() / losses[1][1:].mean()
    assert found == pytest.approx(ratio, rel=1e-4) if ratio < 1 else np.isnan(found)
    assert abs(found - without) > 1e-6


def losses_of(model, ids: list[int]) -> np.ndarray:
    """−log p of every token, NaN for the first."""
    import torch

    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return np.r_[np.nan, -logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()]
