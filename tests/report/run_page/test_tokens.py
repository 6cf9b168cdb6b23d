"""Tokens in view: what would not show is written out, prompts stand side by side, long text is cut and counted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import sample_runs

from tokencredit import CreditRecord, TokenBatch, assign_credit
from tokencredit.batch.store import RecordStore
from tokencredit.report import write_report
from tokencredit.report.page import visible
from tokencredit.report.run_page.folders import Run, load_runs
from tokencredit.report.run_page.tokens import prompt_views, response_views


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", "a·b"),
        ("\n\t\r", "⏎⇥⟨U+000D⟩"),
        ("\x00\x1b[31m\x7f\x85", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩⟨U+0085⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\u202eevil\u200b\u2028\ufeff\u00a0", "⟨U+202E⟩evil⟨U+200B⟩⟨U+2028⟩⟨U+FEFF⟩⟨U+00A0⟩"),
        ("ünïcödé 数学 🎲", "ünïcödé·数学·🎲"),
        ("<b>&\"'", "<b>&\"'"),  # escaping is the template's
    ],
)
def test_visible(text: str, expected: str) -> None:
    assert visible(text) == expected


def test_prompts_keep_their_lines() -> None:
    assert visible("a b\nc\u202e", keep_lines=True) == "a b\nc⟨U+202E⟩"


def record(step: int = 0, *, prompts: list[str] | None = None, entropies: bool = True) -> CreditRecord:
    mask = torch.tensor([[True, True, False, True, False], [True, False, False, False, False], [False] * 5])
    h = torch.tensor([[0.0, 3.0, torch.nan, 0.0, torch.nan]] * 3)
    batch = TokenBatch(
        response_ids=torch.arange(15).reshape(3, 5),
        response_mask=mask,
        rewards=torch.tensor([1.0, 0.0, 0.0]),
        group_ids=torch.zeros(3, dtype=torch.long),
        entropies=torch.where(mask, h, torch.nan) if entropies else None,
        host_advantages=torch.tensor([1.0, -1.0, 0.0]),
    )
    advantages = torch.where(mask, torch.tensor([[2.0], [-1.0], [0.0]]), 0.0)
    advantages[0, 3] = 0.0
    tokens = [["a", "b\n", "env", "c", "<pad>"], ["", "<pad>", "<pad>", "<pad>", "<pad>"], ["<pad>"] * 5]
    return CreditRecord(
        step=step, pipeline="grpo", batch=batch, advantages=advantages, tokens=tokens, prompts=prompts or ["p"] * 3
    )


def test_one_response() -> None:
    first, second = response_views(record(), [0, 1])
    a, b, env, c = first.tokens  # padding behind the last chosen token is not shown
    assert (a.text, a.advantage, a.entropy, a.quadrant, a.strength) == ("a", 2.0, 0.0, "PLR", 1.0)
    assert (b.text, b.quadrant, b.lines) == ("b⏎", "PHR", True)
    assert (env.text, env.advantage, env.entropy, env.quadrant, env.strength) == ("env", None, None, "", 0.0)
    # No credit is left, but the estimator's sign still places the token.
    assert (c.advantage, c.quadrant) == (0.0, "PLR")
    assert (first.reward, first.net, first.left_out) == (1.0, 4.0, 0)
    assert second.tokens[0].text == "∅" and second.tokens[0].strength == 0.5


def test_long_responses_are_cut_and_counted() -> None:
    (view,) = response_views(record(), [0], limit=3)
    assert len(view.tokens) == 3 and view.left_out == 1


def test_missing_fields() -> None:
    bare = replace(record(entropies=False), tokens=[], prompts=[])
    (view,) = response_views(bare, [0])
    assert [token.text for token in view.tokens] == ["⟨0⟩", "⟨1⟩", "⟨2⟩", "⟨3⟩"]
    assert view.tokens[0].entropy is None and view.tokens[0].quadrant == ""


def store(folder: Path, label: str, records: list[CreditRecord]) -> Run:
    for item in records:
        RecordStore(folder / label / "records").append(item)
    return Run(folder=folder / label, name=label, label=label, seed=0)


def test_same_prompt_side_by_side_at_shared_steps(tmp_path: Path) -> None:
    for label in ("grpo", "hapo"):
        sample_runs.write_run(tmp_path / label, label, 0, steps=50, every=25)
    views = prompt_views(load_runs([tmp_path / "grpo", tmp_path / "hapo"]))
    assert [view.step for view in views] == [50] * 4 + [25] * 4 + [0] * 4  # newest first
    for view in views:
        assert [method.label for method in view.methods] == ["grpo", "hapo"]
        for method in view.methods:
            rewards = [response.reward for response in method.responses]
            assert rewards == sorted(rewards, reverse=True) and len(rewards) in (1, 2)


def test_without_a_shared_prompt_each_method_shows_its_own(tmp_path: Path) -> None:
    runs = [
        store(tmp_path, "a", [record(prompts=["x"] * 3)]),
        store(tmp_path, "b", [record(prompts=["y"] * 3)]),
        store(tmp_path, "empty", []),
    ]
    views = prompt_views(runs)
    assert [(view.prompt, [method.label for method in view.methods]) for view in views] == [("x", ["a"]), ("y", ["b"])]
    assert len(views[0].methods[0].responses) == 2  # the empty response is left out


def test_no_records(tmp_path: Path) -> None:
    assert prompt_views([Run(folder=tmp_path, name="a", label="a")]) == []


def test_uniform_credit_of_a_real_pipeline_has_one_colour(tmp_path: Path) -> None:
    batch, tokens, prompts = sample_runs.sample_batch(90, 1)
    item = CreditRecord(
        step=0, pipeline="grpo", batch=batch, advantages=assign_credit("grpo", batch), tokens=tokens, prompts=prompts
    )
    row = int(assign_credit("grpo", batch).abs().sum(1).argmax())
    (view,) = response_views(item, [row])
    assert len({token.strength for token in view.tokens if token.advantage is not None}) == 1


def test_one_colour_scale_for_the_whole_page(tmp_path: Path) -> None:
    pale = replace(record(), advantages=record().advantages / 10)
    views = prompt_views([store(tmp_path, "a", [record()]), store(tmp_path, "b", [pale])])
    strengths = {method.label: method.responses[0].tokens[0].strength for method in views[0].methods}
    assert strengths == pytest.approx({"a": 1.0, "b": 0.1})


def test_words_may_break_before_a_space_and_newlines_break_the_line() -> None:
    tokens = [["x", " word", "\n\n  if", "", "🍓"], *record().tokens[1:]]
    batch = replace(
        record(entropies=False).batch, response_mask=torch.tensor([[True] * 5, [True] + [False] * 4, [False] * 5])
    )
    first, _ = response_views(replace(record(), tokens=tokens, batch=batch), [0, 1])
    assert [token.text for token in first.tokens] == ["x", "·word", "⏎\n⏎\n··if", "▁", "🍓"]
    assert [token.breaks for token in first.tokens] == [False, True, False, False, False]


def test_weights_and_log_probs() -> None:
    logprobs = torch.full((3, 5), -0.5)
    item = record()
    (view,) = response_views(replace(item, batch=replace(item.batch, old_logprobs=logprobs)), [0])
    assert view.tokens[0].weight == pytest.approx(2.0) and view.tokens[0].logprob == pytest.approx(-0.5)
    assert view.tokens[2].weight is None and view.tokens[2].logprob is None  # not chosen by the policy


def test_a_response_that_nothing_scored_says_so(tmp_path: Path) -> None:
    item = record()
    batch = replace(item.batch, scored=torch.tensor([True, False, True]))
    (view,) = prompt_views([store(tmp_path, "a", [replace(item, batch=batch)])])
    assert [response.reward for response in view.methods[0].responses] == [1.0, None]
    text = write_report([tmp_path / "a"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "not scored: no reward function gave it a reward" in text
