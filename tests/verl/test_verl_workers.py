"""Signals of hidden states from verl's own workers: two Ray actors, one model sharded over both, on the CPU."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl_models import collected, tiny
from verl_setup import as_rows, build_trainer, credit_config, nested, rows_of, sampled, store_batch, stored, widths

from tokencredit import assign_credit

HERE = Path(__file__).parent
WORKER_ENV = {"VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_ENGINE_DEVICE": "cuda", "OMP_NUM_THREADS": "1"}
ACTOR = "actor_rollout_ref.actor"
SMALL = (
    f"{ACTOR}.use_torch_compile=False",
    f"{ACTOR}.fsdp_config.use_torch_compile=False",
    f"{ACTOR}.use_dynamic_bsz=True",
    f"{ACTOR}.ppo_max_token_len_per_gpu=32",  # a few rows at a time, sorted by length
    f"{ACTOR}.ppo_mini_batch_size=1",
    f"{ACTOR}.optim.lr=0.01",
    "actor_rollout_ref.rollout.n=10",
    "actor_rollout_ref.model.lora_rank=4",
    "+actor_rollout_ref.model.load_tokenizer=False",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
)
FLOAT32 = f"+{ACTOR}.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}"
LAYOUTS = {
    "fsdp, packed rows": (f"{ACTOR}.strategy=fsdp", "actor_rollout_ref.model.use_remove_padding=True"),
    "fsdp2, padded rows": (f"{ACTOR}.strategy=fsdp2", "actor_rollout_ref.model.use_remove_padding=False"),
    "fsdp2, packed and padded behind, fused head": (
        f"{ACTOR}.strategy=fsdp2",
        "actor_rollout_ref.model.use_remove_padding=True",
        f"{ACTOR}.fsdp_config.pad_to_length=True",
        f"{ACTOR}.fsdp_config.pad_to_length_bucket=40",
        "actor_rollout_ref.model.use_fused_kernels=True",
        "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("model")
    return tiny(folder=folder, tie_word_embeddings=True), folder


def config_of(folder: Path, *overrides: str) -> Any:
    paths = (f"actor_rollout_ref.model.path={folder}", f"actor_rollout_ref.model.lora_adapter_path={folder}/adapter")
    return credit_config(*SMALL, *paths, *overrides)


@pytest.fixture(scope="module", params=list(LAYOUTS))
def workers(request: pytest.FixtureRequest, store: None, model: tuple[Any, Path]) -> Iterator[Any]:
    """verl's worker group of two ranks."""
    config = config_of(model[1], *LAYOUTS[request.param], FLOAT32, "+credit=arca")
    path = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    made = RayClassWithInitArgs(
        ray.remote(ActorRolloutRefWorker), config=config.actor_rollout_ref, role="actor", distillation_config=None
    )
    pool = RayResourcePool([2], use_gpu=False, max_colocate_count=1)
    group = RayWorkerGroup(pool, made, device_name="cpu", worker_env=WORKER_ENV | {"PYTHONPATH": path})
    group.init_model()
    yield group
    for worker in group.workers:
        ray.kill(worker)


def store_sampled(seed: int) -> tuple[Any, Any, list[torch.Tensor]]:
    """A batch as verl's agent loop leaves it: tokens and rewards, no log-probs yet."""
    batch = sampled(seed=seed)
    rows = rows_of(batch)
    prompts, responses = rows["prompts"].unbind(), rows["responses"].unbind()
    ids = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    lengths = [len(row) for row in ids]
    width = max(lengths)
    more = {
        "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
        "position_ids": nested(torch.arange(width).expand(len(ids), width), lengths),
        "loss_mask": rows["response_mask"],
    }
    return batch, store_batch(batch, drop=("old_log_probs", "entropy", "ref_log_prob"), **more), ids


def scored_step(trainer: Any, meta: Any) -> Any:
    """The steps of verl's `_step_once` between sampling and the update."""
    meta = trainer._compute_old_log_prob(meta, {})
    meta = trainer._compute_ref_log_prob(meta, {})
    return trainer._compute_advantage(meta, {})


@pytest.mark.parametrize("method", ["attention", "arca", "0.5 * attention + 0.5 * arca"])
def test_the_workers_columns_and_the_credit_of_them(workers: Any, model: tuple[Any, Path], method: str) -> None:
    trainer = build_trainer(config_of(model[1], f"+credit.method='{method}'"))
    trainer.actor_rollout_wg, trainer.ref_in_actor = workers, True
    batch, meta, ids = store_sampled(seed=8)
    meta = scored_step(trainer, meta)
    scored = replace(batch, **collected(model[0], ids, widths(batch), batch.response_mask.shape))
    fields = {"old_log_probs": "old_logprobs", "ref_log_prob": "ref_logprobs", "entropy": "entropies"}
    fields |= {name: name for name in trainer._signals}
    for stored_name, field in fields.items():
        wanted = as_rows(getattr(scored, field), batch)
        for got, row in zip(stored(meta, stored_name), wanted, strict=True):
            torch.testing.assert_close(got.float(), row, atol=1e-5, rtol=1e-5)
    for got, row in zip(stored(meta, "advantages"), as_rows(assign_credit(method, scored), batch), strict=True):
        torch.testing.assert_close(got, row, atol=2e-5, rtol=2e-5)


def test_an_update_moves_the_policy_and_not_the_reference(workers: Any, model: tuple[Any, Path]) -> None:
    """The last test of a group: it trains. verl's update reads the rows with our columns among them."""
    trainer = build_trainer(config_of(model[1], "+credit.method=arca"))
    trainer.actor_rollout_wg, trainer.ref_in_actor = workers, True
    _, meta, _ = store_sampled(seed=9)
    meta = scored_step(trainer, meta)
    fields = ("old_log_probs", "adapter_residuals", "ref_log_prob")
    before = {name: torch.cat(stored(meta, name)) for name in fields}
    metrics: dict[str, Any] = {}
    trainer._update_actor(meta, metrics)
    assert metrics["actor/grad_norm"] > 0
    meta.extra_info.clear()  # of the update; the next step of a run has a batch of its own
    scored_step(trainer, meta)
    after = {name: torch.cat(stored(meta, name)) for name in fields}
    assert (after["old_log_probs"] - before["old_log_probs"]).abs().max() > 1e-3
    assert (after["adapter_residuals"] - before["adapter_residuals"]).abs().max() > 1e-3
    torch.testing.assert_close(after["ref_log_prob"], before["ref_log_prob"], atol=1e-5, rtol=1e-5)
