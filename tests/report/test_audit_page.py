"""The audit page: numbers survive their packing, one scale for all methods, foreign text stays text."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tokencredit import TokenBatch, assign_credit
from tokencredit.report import audit_page
from tokencredit.report.audit_page import Audit, page_data, render_audit, write_audit

NASTY = ["</script><script>alert(1)</script>", "<b>", "\u202e", "\x1b[31m", "\n", " a", "\ud800"]


def audit(**changes: object) -> Audit:
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()
    generator = torch.Generator().manual_seed(0)
    batch = TokenBatch(
        response_ids=torch.zeros(2, 7, dtype=torch.long),
        response_mask=mask,
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.zeros(2, dtype=torch.long),
        entropies=torch.rand(2, 7, generator=generator),
        old_logprobs=-torch.rand(2, 7, generator=generator),
    )
    advantages = {name: assign_credit(name, batch) for name in ("grpo", "hapo", "surprisal")}
    given = {"tokens": [NASTY, NASTY], "prompts": ["<i>p</i>", "<i>p</i>"], "bases": advantages["grpo"][:, 0]}
    return Audit(**{"title": "t", "batch": batch, "advantages": advantages, **given, **changes})  # type: ignore[arg-type]


def unpack(text: str | float, step: float, width: int, length: int) -> np.ndarray:
    if not isinstance(text, str):
        return np.full(length, text)
    return np.frombuffer(base64.b64decode(text), dtype="<i2" if width == 2 else "<i1") * step


@pytest.mark.parametrize(("fine", "width", "tolerance"), [(10**6, 2, 1 / 32_767), (0, 1, 1 / 127)])
def test_numbers_survive(fine: int, width: int, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_page, "FINE", fine)
    given = audit()
    data = json.loads(json.dumps(page_data(given)))
    assert data["bytes"] == width and [row["length"] for row in data["responses"]] == [7, 3]
    for row, response in enumerate(data["responses"]):
        length = response["length"]
        mask = given.batch.response_mask[row, :length].numpy()
        assert response["unchosen"] == [place for place in range(length) if not mask[place]]
        for method, text in zip(data["methods"], response["credit"], strict=True):
            exact = given.advantages[method["name"]][row, :length].numpy()
            packed = unpack(text, method["step"], width, length)
            assert np.abs(packed - exact)[mask].max() <= tolerance * abs(exact).max() * 2
    assert isinstance(data["responses"][0]["credit"][0], float)  # uniform credit is one number
    assert data["responses"][0]["reward"] == 1.0 and data["prompts"] == ["<i>p</i>"]


def test_foreign_text_is_never_markup() -> None:
    page = render_audit(audit(title="<x>", warnings=["<w>"], facts={"<f>": "</table>"}))
    assert "<x>" not in page and "<w>" not in page and "<f>" not in page and "<i>p</i>" not in page
    assert page.count("</script>") == 2, "the data ends nowhere but at its own end"
    inside = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert inside is not None
    texts = json.loads(inside.group(1))["responses"][0]["text"].split(audit_page.SEPARATOR)
    assert len(texts) == 7 and texts[0] == NASTY[0]
    assert "\x1b" not in page and "\u202e" not in page and "⟨U+202E⟩" in texts[2]


def test_an_unscored_response_and_an_empty_one(tmp_path: Path) -> None:
    given = audit()
    mask = given.batch.response_mask.clone()
    mask[1] = False
    fields = given.batch.tensors() | {"response_mask": mask, "scored": torch.tensor([False, True])}
    path = write_audit(audit(batch=TokenBatch(**fields)), tmp_path / "new" / "audit.html")
    data = page_data(audit(batch=TokenBatch(**fields)))
    assert data["responses"][0]["reward"] is None and data["responses"][1]["length"] == 0
    assert path.read_text(errors="replace").startswith("<!doctype html>")
