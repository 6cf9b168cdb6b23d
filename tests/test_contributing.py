"""The example of CONTRIBUTING.md, carried out: a batch field with its collector."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("## A batch field with its collector")[2]
FILE = re.compile(r"^`(src/[\w/]+\.py)`", re.MULTILINE)
BLOCK = re.compile(r"```(diff|python)\n(.*?)```", re.DOTALL)

PROGRAM = """
import torch
from tokencredit import TokenBatch
from tokencredit.adapters.trl.collectors import built_in
from tokencredit.collect.rollout import Rollout
from tokencredit.collect.table import resolve_options
from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer

tokenizer = build_tokenizer("0123456789")
model = build_model(tokenizer, layers=1, width=32, heads=2, seed=1)
ids = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 4]])
ones = torch.ones(2, 2, dtype=torch.bool)
rollout = Rollout(
    model=model, tokenizer=tokenizer, prompt_ids=ids[:, :2], prompt_mask=ones, response_ids=ids[:, 2:],
    response_mask=ones, rewards=torch.ones(2), group_ids=torch.zeros(2, dtype=torch.long), columns=[{}, {}],
    temperature=1.0, rows_per_pass=1,
)
expected = model.model(ids).last_hidden_state[:, 1:3].norm(dim=-1).detach()
for root in (False, True):
    options, _ = resolve_options({"state_norms": {"root": root}})
    norms = built_in(options, None, adapter=False)["state_norms"](rollout)
    torch.testing.assert_close(norms, expected.sqrt() if root else expected)
fields = {name: getattr(rollout, name) for name in ("response_ids", "response_mask", "rewards", "group_ids")}
assert TokenBatch(**fields, state_norms=norms).require("state_norms") is norms
missing = lambda: TokenBatch(**fields).require("state_norms")
for refused in (missing, lambda: resolve_options({"state_norms": {"root": 1}})):
    try:
        refused()
    except TokenCreditError as error:
        print(error.hint or error.message)
"""


def apply(block: str, text: str) -> str:
    """The text with the lines that a block marks by `+`, after the lines that it shows before them."""
    context = "".join(line[1:] + "\n" for line in block.splitlines() if line.startswith(" "))
    added = "".join(line[1:] + "\n" for line in block.splitlines() if line.startswith("+"))
    assert text.count(context) == 1, f"CONTRIBUTING.md shows lines that are not there once:\n{context}"
    return text.replace(context, context + added)


def test_a_field_with_its_collector_is_what_contributing_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    places = [*FILE.finditer(SECTION)]
    for place, after in zip(places, [*places[1:], None], strict=True):
        path = tmp_path / place[1]
        for kind, block in BLOCK.findall(SECTION[place.end() : after.start() if after else None]):
            path.write_text(block if kind == "python" else apply(block, path.read_text()))
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(places) == 3  # and the test: four files
    assert "the length of the hidden state" in done.stdout
    assert "`root` of the collector of `state_norms` must be true or false, got 1" in done.stdout
