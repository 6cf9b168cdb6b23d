"""Two ranks equal one rank: every row of the tables on two gloo processes, started once for all of them."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import Case, all_cases, make_batch, permuted, token_advantages, widened

from tokencredit.batch.records import TokenBatch
from tokencredit.batch.reduce import ProcessGroupReducer
from tokencredit.pipeline.assign import assign_credit
from tokencredit.pipeline.pipeline import Pipeline
from tokencredit.seeds import generator

CASES = all_cases()
ROWS = [case for case in CASES if not case.given]
GROUPS = (5, 3, 1, 4)  # 13 rows; the groups straddle the ranks because their rows are mixed
# rows of rank 0: an unequal share, and all of them
SPLITS = {"straddling": 5, "all on one": 13}


def whole() -> TokenBatch:
    return make_batch(seed=3, groups=GROUPS)


def part(rank: int, first: int) -> TokenBatch:
    """The rows of one rank; rank 0 is padded wider, as ranks pad to their own longest response."""
    batch = whole()
    rows = torch.arange(first) if rank == 0 else torch.arange(first, len(batch.rewards))
    own = permuted(batch, rows)
    own = widened(own, torch.arange(12), 15) if rank == 0 else own
    return replace(own, reducer=ProcessGroupReducer())


def part_advantages(batch: TokenBatch, rank: int, first: int) -> torch.Tensor:
    """The advantages that the whole batch has, on the rows of one rank."""
    rows = slice(0, first) if rank == 0 else slice(first, None)
    advantages = token_advantages(whole())[rows]
    wide = torch.full(batch.response_mask.shape, torch.nan, dtype=torch.float64)
    wide[:, :12] = advantages
    return wide


def unscored_part(rank: int) -> TokenBatch:
    """The rows of one rank; only rank 0 has rows without a score, among them a whole group's share."""
    batch = part(rank, SPLITS["straddling"])
    if rank == 1:
        return batch
    scored = torch.arange(len(batch.rewards)) > 1
    return replace(batch, scored=scored, rewards=torch.where(scored, batch.rewards, torch.nan))


def door(case: Case, batch: TokenBatch) -> torch.Tensor:
    return assign_credit(Pipeline.of(*case.steps), batch, generator=generator("tests", "ranks"))


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = {}
    for split, first in SPLITS.items():
        batch = part(rank, first)
        advantages = part_advantages(batch, rank, first)
        for case in CASES:
            found[f"{split}: {case!r}"] = case.raw(batch, advantages, base=1.7 * advantages)[:, :12].numpy()
    scored = unscored_part(rank)
    for case in ROWS:
        found[f"scored: {case!r}"] = door(case, scored)[:, :12].numpy()
    np.savez(Path(folder) / f"rank{rank}.npz", **found)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=2)
    first, second = (np.load(folder / f"rank{rank}.npz") for rank in range(2))
    return {name: torch.from_numpy(np.concatenate((first[name], second[name]))) for name in first.files}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_two_ranks_equal_one(case: Case, on_two_ranks: dict[str, torch.Tensor]) -> None:
    alone = case.raw(whole(), token_advantages(whole()), base=1.7 * token_advantages(whole()))
    for split in SPLITS:
        torch.testing.assert_close(on_two_ranks[f"{split}: {case!r}"], alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", ROWS, ids=repr)
def test_unscored_rows_of_one_rank_are_absent_on_all(case: Case, on_two_ranks: dict[str, torch.Tensor]) -> None:
    batch = whole()
    kept = torch.arange(len(batch.rewards)) > 1
    expected = torch.zeros(batch.response_mask.shape)
    expected[kept] = door(case, batch.rows(kept))
    torch.testing.assert_close(on_two_ranks[f"scored: {case!r}"], expected, rtol=1e-6, atol=1e-7)


def test_the_parts_really_straddle_groups() -> None:
    ids, first = whole().group_ids, SPLITS["straddling"]
    assert set(ids[:first].tolist()) & set(ids[first:].tolist())
