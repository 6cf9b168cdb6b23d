"""Two gloo ranks give what one gives, groups straddling the ranks."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokencredit import assign_credit
from tokencredit.store import RecordStore

SCRIPT = Path(__file__).with_name("ranks_script.py")


def launch(folder: Path, ranks: int, rows: int, credit: str, timing: str) -> tuple[list, list[float]]:
    folder.mkdir()
    arguments = [str(folder), str(rows), credit, timing]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)
    result = folder / "result.txt"
    assert result.is_file(), done.stderr[-3000:]
    world, norms = result.read_text().splitlines()
    assert int(world) == ranks  # some launchers start one process whatever they are told
    return list(RecordStore(folder / "records")), ast.literal_eval(norms)


@pytest.mark.parametrize(("credit", "timing"), [("hapo", "update"), ("gtpo", "rollout")])
def test_two_ranks_give_what_one_gives(tmp_path: Path, credit: str, timing: str) -> None:
    one, norms_one = launch(tmp_path / "one", 1, 12, credit, timing)
    two, norms_two = launch(tmp_path / "two", 2, 6, credit, timing)  # groups of 4: the second lies on both ranks
    assert len(one) == len(two) == 2
    for single, double in zip(one, two, strict=True):
        assert torch.equal(single.batch.response_ids, double.batch.response_ids)
        assert torch.equal(single.batch.response_mask, double.batch.response_mask)
        assert torch.equal(single.batch.group_ids, double.batch.group_ids)
        assert single.tokens == double.tokens
        torch.testing.assert_close(single.batch.entropies, double.batch.entropies, rtol=1e-4, atol=1e-5)
        # The pure function on the gathered batch, in one process, against what two ranks worked out together.
        torch.testing.assert_close(assign_credit(credit, double.batch), double.advantages, rtol=1e-6, atol=1e-7)
        # Entropies of a fresh model differ by little more than the forwards' rounding, which credit divides by.
        torch.testing.assert_close(single.advantages, double.advantages, rtol=1e-2, atol=1e-3)
    assert norms_one == pytest.approx(norms_two, rel=1e-4)
