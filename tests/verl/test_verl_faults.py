"""verl trains inside a Ray actor; when that is killed, what it wrote is whole and another one goes on."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

from tokencredit.batch.store import RecordStore

pytestmark = pytest.mark.usefixtures("store")

HERE = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
FIRST, BROKEN, LAST = 1, 3, 4


@ray.remote(max_restarts=0)
class Driver:
    """Where verl's `main_ppo` runs its trainer; the store's other actors outlive it."""

    def train(self, folder: str, first: int, killed_at: int | None, writing: bool, here: list[str]) -> list[int]:
        sys.path += here  # of the test, which an actor does not inherit
        import transfer_queue as tq
        from verl_setup import build_trainer, credit_config, sampled, store_batch

        tq.init()
        for step in range(first, LAST + 1):
            trainer = build_trainer(credit_config("+credit.method=hapo", f"+credit.records={folder}"), step)
            trainer.tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: [str(list(row)) for row in rows])
            meta = store_batch(sampled(seed=step))
            if step == killed_at and writing:  # the record's tensors lie under a temporary name, no line names them
                os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            elif step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            trainer._compute_advantage(meta, {})
        return RecordStore(folder).steps


def train(folder: Path, first: int = FIRST, killed_at: int | None = None, writing: bool = False) -> list[int]:
    return ray.get(Driver.remote().train.remote(str(folder), first, killed_at, writing, HERE), timeout=200)


def test_a_killed_actor_stops_training_and_its_records_are_whole(store: None, tmp_path: Path) -> None:
    assert train(tmp_path / "whole") == [1, 2, 3, 4]
    with pytest.raises(ray.exceptions.RayActorError, match="died"):
        train(tmp_path / "cut", killed_at=BROKEN)
    assert RecordStore(tmp_path / "cut").steps == [1, 2]
    # verl goes on from its last checkpoint, here that of step 1: the records behind it are written again.
    with pytest.raises(ray.exceptions.RayActorError, match="died"):
        train(tmp_path / "cut", first=2, killed_at=BROKEN, writing=True)
    assert RecordStore(tmp_path / "cut").steps == [1, 2] and list((tmp_path / "cut").glob("*.tmp"))
    assert train(tmp_path / "cut", first=2) == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    for one, other in zip(RecordStore(tmp_path / "whole"), RecordStore(tmp_path / "cut"), strict=True):
        assert one.step == other.step
        assert torch.equal(one.advantages, other.advantages)
        assert one.prompts == other.prompts
