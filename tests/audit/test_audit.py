"""The audit: methods on the same responses, from a task, a run's records, or a file of another engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokencredit.audit.measure import run_audit, summary_of
from tokencredit.audit.settings import AuditSettings
from tokencredit.batch.records import CreditRecord, TokenBatch
from tokencredit.batch.store import RecordStore
from tokencredit.cli.main import main
from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.pipeline.assign import assign_credit

LAB = {"task": "countdown", "prompts": 2, "samples": 4, "max_tokens": 14}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the lab's characters."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer("0123456789+-=,:;abcdefghij")
    build_model(tokenizer, layers=2, width=32, heads=2, seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_every_kind_of_method_on_one_sample(folder: Path) -> None:
    shuffled = ["hapo", "shuffle_within_response"]
    credit = ("grpo", "hapo", "exact", "surprisal", "attention", "success_trie", "opsd", shuffled)
    teacher = {"kind": "self", "template": "{answer}={prompt}"}
    audit = run_audit(AuditSettings(model=str(folder), credit=credit, teacher=teacher, **LAB))
    assert len(audit.advantages) == len(credit), audit.warnings
    assert len(audit.tokens) == 8 and audit.batch.values is not None
    mask = audit.batch.response_mask
    for advantages in audit.advantages.values():
        assert bool(torch.isfinite(advantages).all()) and not advantages[~mask].any()
    uniform = torch.where(mask, audit.advantages["grpo"], 0.0).sum(1) / mask.sum(1)
    torch.testing.assert_close(audit.bases, uniform)
    assert audit.facts["responses"].startswith("8 to 2 prompts")
    fewer = run_audit(AuditSettings(model=str(folder), credit=("grpo",), **LAB | {"prompts": 1}))
    shared = min(fewer.batch.response_ids.shape[1], audit.batch.response_ids.shape[1])
    assert torch.equal(fewer.batch.response_ids[:, :shared], audit.batch.response_ids[:4, :shared])


def test_what_cannot_be_computed_is_left_out_with_the_reason(folder: Path) -> None:
    audit = run_audit(AuditSettings(model=str(folder), credit=("grpo", "arca"), **LAB))
    assert list(audit.advantages) == ["grpo"]
    assert any(line.startswith("arca is left out: ") and "adapter" in line for line in audit.warnings)
    with pytest.raises(TokenCreditError, match="no method can be shown"):
        run_audit(AuditSettings(model=str(folder), credit=("arca",), **LAB))


def test_without_a_mixed_group_the_page_says_why_nothing_shows(folder: Path) -> None:
    audit = run_audit(AuditSettings(model=str(folder), credit=("grpo",), **LAB | {"max_tokens": 2}))
    assert audit.facts["mixed groups"] == "0 of 2"
    assert "choose easier problems" in audit.warnings[0]


def test_records_of_a_run(tmp_path: Path) -> None:
    batch = TokenBatch(
        response_ids=torch.tensor([[1, 2], [3, 4]]),
        response_mask=torch.ones(2, 2, dtype=torch.bool),
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.zeros(2, dtype=torch.long),
        entropies=torch.rand(2, 2),
    )
    shown = {"tokens": [["a", "b"], ["c", "d"]], "prompts": ["p", "p"], "pipeline": ["group_normalized"]}
    record = CreditRecord(step=3, batch=batch, advantages=assign_credit("grpo", batch), **shown)
    (tmp_path / "empty" / "records").mkdir(parents=True)
    with pytest.raises(TokenCreditError, match="no records"):
        run_audit(AuditSettings(source=tmp_path / "empty", credit=("grpo",)))
    RecordStore(tmp_path / "run" / "records").append(record)
    audit = run_audit(AuditSettings(source=tmp_path / "run", credit=("grpo", "hapo", "surprisal")))
    assert list(audit.advantages) == ["grpo", "hapo"] and audit.facts["step"] == "3"
    assert any("surprisal is left out" in line for line in audit.warnings)


ROWS = [
    {"prompt": "5,8=13:", "response": "5+8=13", "reward": 1.0},
    {"input": "5,8=13:", "output": "5-8", "score": 0.0},
    {"prompt": "5,8=13:", "completion": "8", "reward": None, "finish_reason": "length"},
    {"prompt_ids": [3, 4], "response_ids": [5, 6], "reward": 0.5},
]


def test_a_file_of_responses_from_any_engine(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    audit = run_audit(AuditSettings(model=str(folder), source=path, credit=("grpo", "surprisal")))
    lengths = audit.batch.response_mask.sum(1).tolist()
    assert lengths == [7, 4, 1, 2]  # texts end with EOS but where they were cut off; ids are taken as they are
    assert audit.batch.scored is not None and audit.batch.scored.tolist() == [True, True, False, True]
    assert audit.batch.group_ids.tolist() == [0, 0, 0, 1]
    assert not audit.advantages["grpo"][2].any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"response": "1"}', "line 1 has none of prompt"),
        ('{"prompt": "1", "response": 3}', "must be a text or token ids"),
        ('{"prompt": "1", "response": "1", "reward": "good"}', "the reward must be a number or null"),
        ('{"prompt": "1", "response_ids": ["a"]}', "whole numbers"),
        ("[1]", "is not an object"),
        ("{", "not valid JSON"),
        ("", "has no responses"),
    ],
)
def test_bad_rows_are_one_line_with_the_place(tmp_path: Path, folder: Path, line: str, message: str) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text(line)
    with pytest.raises(TokenCreditError, match=message):
        run_audit(AuditSettings(model=str(folder), source=path, credit=("grpo",)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a task or a file"),
        ({"task": "countdown"}, "needs `--model`"),
        ({"task": "countdown", "model": "x", "samples": 1}, "`samples` must be at least 2"),
        ({"task": "countdown", "model": "x", "temperature": 0.0}, "`temperature`"),
        ({"task": "countdown", "model": "x", "credit": ()}, "at least one method"),
    ],
)
def test_settings_are_checked_first(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        AuditSettings(**given)


def test_the_command_writes_a_page_and_prints_numbers(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "audit.html"
    given = ["audit", "--model", str(folder), "--task", "countdown", "--prompts", "2", "--samples", "4"]
    given += ["--max-tokens", "14", "--out", str(page), "--credit"]
    assert main([*given, "grpo", "hapo", "surprisal", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["page"] == str(page) and page.is_file() and len(printed["agreement"]) == 3
    assert main([*given, "gropo"]) == 2
    assert "did you mean 'grpo'" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "absent")]) == 2


def test_the_summary_is_json(folder: Path) -> None:
    audit = run_audit(AuditSettings(model=str(folder), credit=("grpo", "hapo"), **LAB))
    assert json.loads(json.dumps(summary_of(audit)))["facts"]["task"] == "countdown"
