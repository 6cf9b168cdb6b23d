"""The bound on memory is one, and the device: what is not there is refused, and nothing of two devices mixes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import fakecuda
from support.bench_task import ALPHABET
from support.live_bytes import LiveBytes

from tokencredit import TokenCreditError
from tokencredit.bench import measure as measuring
from tokencredit.bench.cell import assign_all
from tokencredit.bench.config import BenchConfig
from tokencredit.bench.entries import FIELD_COLLECTORS, entries
from tokencredit.bench.measure import exact_target, measure
from tokencredit.bench.memory import AHEAD, Plan, plan_memory
from tokencredit.bench.problem import load_device, load_world
from tokencredit.bench.sampling import Sampled, draw
from tokencredit.bench.teacher import load_teacher, teacher_collectors, teacher_success
from tokencredit.lab.model import build_model, build_tokenizer

TASK = "support.bench_task:letters"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> BenchConfig:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(ALPHABET)
    build_model(tokenizer, layers=2, width=64, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return BenchConfig(tasks=(TASK,), model=str(folder), prompts=6, rollouts=16, resamples=20, sketch=500)


def ahead_in_one_thread(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """As many results wait as with threads, which a dispatch mode does not see."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(work(item))
        if len(waiting) == AHEAD:
            yield waiting.popleft()
    yield from waiting


def test_the_bound_holds(config: BenchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_ahead", ahead_in_one_thread)
    world = load_world(config, TASK, "given")
    samples = [draw(world, config, replicate) for replicate in range(2)]
    chosen, _ = entries((), controls=True, collectors=FIELD_COLLECTORS)
    advantages = [assign_all(chosen, sampled, config, FIELD_COLLECTORS) for sampled in samples]
    plans = []
    for mebibytes in (12, 24, 256):
        plan = plan_memory(config.replace(memory_mib=mebibytes), samples, len(chosen), 2)
        plans.append(plan)
        with LiveBytes() as live:
            target = exact_target(world, config, lambda steps=1, note="": None)
            part = [item[: plan.pipelines] for item in advantages]
            measure(samples, part, target, plan, lambda steps=1, note="": None)
        assert live.peak <= mebibytes * 2**20, (plan, live.peak)
        if plan.pipelines < len(chosen):
            assert live.peak > mebibytes * 2**20 / 4, (plan, live.peak)  # and what is there is used
        del target
    assert plans[0].pipelines < plans[1].pipelines < plans[2].pipelines == len(chosen)
    with pytest.raises(TokenCreditError, match=r"`memory_mib` is 1, and the gradients of one pipeline take \d MiB"):
        plan_memory(config.replace(memory_mib=1), samples, 1, 2)


def test_vectors_of_a_backward_change_no_number(config: BenchConfig) -> None:
    config = config.replace(dtype="float64", prompts=2)
    world = load_world(config, TASK, "given")
    samples = [draw(world, config, 0)]
    chosen, _ = entries(("grpo", "hapo", "phr", "psr"), controls=True, collectors={})
    advantages = [assign_all(chosen, samples[0], config, {})]
    target = exact_target(world, config, lambda steps=1, note="": None)
    done: list[int] = []
    one, all_ = (
        measure(samples, advantages, target, Plan(len(chosen), vectors), lambda steps=1, note="": done.append(steps))
        for vectors in (1, 100)
    )
    for name in ("own", "cross", "own_total", "cross_total", "after"):
        torch.testing.assert_close(torch.tensor(getattr(one, name)), torch.tensor(getattr(all_, name)))
    assert done == [1] * 4  # once per prompt


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:7", "there is no device 'cuda:7': torch sees . CUDA devices"),
        ("gpu", "unknown device 'gpu'"),
        ("meta", "the benchmark runs on cpu and cuda devices"),
    ],
)
def test_devices_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(TokenCreditError, match=message):
        load_device(name)


def everything(sampled: Sampled, taught: dict) -> dict[str, torch.Tensor]:
    batch = sampled.batch
    fields = {"ids": batch.response_ids, "logprobs": batch.require("old_logprobs"), "values": batch.require("values")}
    # The adapter's fields need a backward pass, and `importances` an operation that the pretend device lacks.
    left_out = {"adapter_residuals", "doubling_ratios", "ref_logprobs", "importances"}
    fields |= {name: FIELD_COLLECTORS[name](sampled) for name in sorted(FIELD_COLLECTORS.keys() - left_out)}
    return fields | {name: collector(sampled) for name, collector in taught.items()}


def test_no_tensors_mix_where_the_model_is_on_a_device(config: BenchConfig) -> None:
    fakecuda.require()
    config = config.replace(prompts=2, teacher={"kind": "self", "template": "b{prompt}"}, teacher_samples=8)
    world = load_world(config, TASK, "given")
    teacher = load_teacher(world, config, TASK)
    expected = everything(draw(world, config, 0), teacher_collectors(teacher))
    success = teacher_success(teacher, world)
    probe = measuring._probe(world, config)
    shift = torch.full((sum(item.numel() for item in world.model.parameters()),), 1e-3)
    moved_by = probe(shift)
    with fakecuda.session():
        there = replace(world, model=fakecuda.move_module(world.model))
        assert there.device.type == "cuda"
        taught = load_teacher(there, config, TASK)
        measured = everything(draw(there, config, 0), teacher_collectors(taught))
        assert all(value.device.type == "cpu" and not value.is_cuda for value in measured.values())
        assert teacher_success(taught, there) == pytest.approx(success)
        assert measuring._probe(there, config)(fakecuda.cuda(shift)) == pytest.approx(moved_by, abs=1e-6)
    for name, value in expected.items():
        # float32 passes, some kept in float64
        torch.testing.assert_close(measured[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)
