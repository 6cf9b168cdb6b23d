"""Signals of hidden states: verl's FSDP engine on a tiny model against our collectors, then through the store."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import flash_kernel
import pytest
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from transformers.integrations import flash_attention
from verl.models.transformers import monkey_patch
from verl.utils import tensordict_utils
from verl.workers.engine.fsdp import transformer_impl
from verl_models import collected, tiny
from verl_setup import PARTITION, as_rows, build_trainer, credit_config, sampled, store_batch, stored, widths

from tokencredit import assign_credit
from tokencredit.adapters.verl import signals as verl_signals
from tokencredit.collect.adapter_residual import adapter_residuals
from tokencredit.collect.attention.entropies import attention_entropies
from tokencredit.collect.table import resolve_options
from tokencredit.errors import TokenCreditError

LENGTHS = ((3, 5), (2, 7), (4, 1))  # prompt and response of each row
BOTH = {name: OPTIONS[name] for name in ("attention_entropies", "adapter_residuals")}
LORA = "actor_rollout_ref.model.lora_rank=4"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl's engine around a model on the CPU: its input and output code is its own, its sharding is left out."""
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")
    made = transformer_impl.FSDPEngineWithLMHead.__new__(transformer_impl.FSDPEngineWithLMHead)
    made.module, made._autocast_dtype, made.pad_to_length = tiny(), torch.float32, False
    made.ulysses_sequence_parallel_size, made.use_ulysses_sp = 1, False
    made.engine_config = SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False, entropy_from_logits_chunk_size=2048
    )
    made.compute_entropy_from_logits = lambda logits: torch.distributions.Categorical(logits=logits).entropy()
    return made


def micro_batch(ids: list[torch.Tensor], packed: bool, asked: Any = None) -> TensorDict:
    """What `forward_backward_batch` hands to `forward_step`."""
    lengths = [len(row) for row in ids]
    places = [torch.arange(length) for length in lengths]
    data = TensorDict(
        {
            "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
            "position_ids": torch.nested.as_nested_tensor(places, layout=torch.jagged),
        },
        batch_size=len(ids),
    )
    more = {"use_remove_padding": packed, "calculate_entropy": True, "temperature": 1.0, "compute_loss": False}
    if asked is not None:
        more[verl_signals.ASKED] = json.dumps(asked)
    tensordict_utils.assign_non_tensor(data, **more)
    return data


def random_ids() -> list[torch.Tensor]:
    return [torch.randint(0, 2048, (prompt + response,)) for prompt, response in LENGTHS]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("options", [{}, {"layer": [0, 2], "row": "own", "drop_sink": 1}, {"heads": "mean_entropy"}])
def test_columns_are_what_the_collectors_give(engine: Any, packed: bool, options: dict[str, Any]) -> None:
    ids = random_ids()
    asked = BOTH | {"attention_entropies": resolve_options({})[0]["attention_entropies"] | options}
    _, output = engine.forward_step(micro_batch(ids, packed, asked), None, True)
    columns = output["model_output"]
    for index, (prompt, response) in enumerate(LENGTHS):
        row, place = ids[index][None], slice(prompt - 1, prompt + response - 1)
        entropies = attention_entropies(engine.module, row, None, prompt, response, **options)[0]
        residuals, reference = adapter_residuals(engine.module, row, None, prompt, response, ref_temperature=1.0)
        got = {name: columns[verl_signals.column(name)][index][place] for name in (*BOTH, verl_signals.REFERENCE)}
        torch.testing.assert_close(got["attention_entropies"], entropies, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got["adapter_residuals"], residuals[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[verl_signals.REFERENCE], reference[0], atol=1e-5, rtol=1e-5)


def test_sliding_windows_are_seen(engine: Any) -> None:
    engine.module = tiny(sliding_window=3, use_sliding_window=True, max_window_layers=0)
    ids = [torch.randint(0, 2048, (9,)), torch.randint(0, 2048, (12,))]
    asked = {"attention_entropies": OPTIONS["attention_entropies"]}
    for packed in (True, False):
        _, output = engine.forward_step(micro_batch(ids, packed, asked), None, True)
        for index, row in enumerate(ids):
            wanted = attention_entropies(engine.module, row[None], None, 4, len(row) - 4)[0]
            got = output["model_output"][verl_signals.column("attention_entropies")][index][3:-1]
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_flash_attention_is_tapped(engine: Any, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids()
    rows = zip(ids, LENGTHS, strict=True)
    wanted = [attention_entropies(engine.module, row[None], None, *spans)[0] for row, spans in rows]
    flash_kernel.install(monkeypatch)
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)  # it asks TRL for a class that is gone
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", flash_attention._flash_attention_forward)
    monkey_patch.apply_monkey_patch(
        engine.module.get_base_model(), use_remove_padding=packed
    )  # verl puts its own call in between
    engine.module.config._attn_implementation = "flash_attention_2"
    asked = {"attention_entropies": OPTIONS["attention_entropies"]}
    _, output = engine.forward_step(micro_batch(ids, packed, asked), None, True)
    for index, (prompt, response) in enumerate(LENGTHS):
        got = output["model_output"][verl_signals.column("attention_entropies")][index][prompt - 1 :][:response]
        torch.testing.assert_close(got, wanted[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_host_s_own_columns_are_untouched(engine: Any, packed: bool) -> None:
    ids = random_ids()
    _, plain = engine.forward_step(micro_batch(ids, packed), None, True)
    _, asked = engine.forward_step(micro_batch(ids, packed, BOTH), None, True)
    assert set(plain["model_output"]) == {"log_probs", "entropy"}
    for name, column in plain["model_output"].items():
        assert torch.equal(asked["model_output"][name].values(), column.values())


def test_sequence_parallelism_is_refused(engine: Any) -> None:
    engine.ulysses_sequence_parallel_size = 2
    with pytest.raises(TokenCreditError, match="whole sequences in a worker, got ulysses_sequence_parallel_size=2"):
        engine.forward_step(micro_batch(random_ids(), True, BOTH), None, True)


class Workers:
    """The worker group's place: verl's engine on what the store holds, its output back in the store."""

    def __init__(self, engine: Any, ids: list[torch.Tensor]) -> None:
        self.engine, self.ids, self.passes = engine, ids, []

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        asked = batch.extra_info.get(verl_signals.ASKED)
        self.passes.append(sorted(json.loads(asked)) if asked else [])
        data = micro_batch(self.ids, True, json.loads(asked) if asked else None)
        off = batch.extra_info.pop("no_lora_adapter", False)
        with self.engine.disable_adapter() if off else nullcontext():
            _, output = self.engine.forward_step(data, None, True)
        found = {"entropy": output["model_output"].pop("entropy"), **output["model_output"]}
        tq.kv_batch_put(keys=batch.keys, partition_id=PARTITION, fields=TensorDict(found, batch_size=len(batch.keys)))
        return batch


@pytest.mark.parametrize(("method", "passes"), [("attention", 1), ("arca", 1), ("policy_divergence", 2)])
def test_the_credit_step_equals_the_pure_function(store: None, engine: Any, method: str, passes: int) -> None:
    trainer = build_trainer(credit_config(f"+credit.method={method}", LORA))
    batch = sampled(seed=4)
    meta = store_batch(batch, drop=("old_log_probs", "entropy", "ref_log_prob"))
    lengths = widths(batch)
    ids = [torch.cat((torch.full((3,), 7), row[:n])) for row, n in zip(batch.response_ids, lengths, strict=True)]
    trainer.actor_rollout_wg = trainer.ref_policy_wg = Workers(engine, ids)
    trainer.ref_in_actor = True
    trainer._compute_old_log_prob(meta, {})
    if method != "attention":
        trainer._compute_ref_log_prob(meta, {})
    assert len(trainer.actor_rollout_wg.passes) == passes  # with residuals the reference has been scored already
    trainer._compute_advantage(meta, {})
    scored = replace(batch, **collected(engine.module, ids, lengths, batch.response_mask.shape))
    wanted = as_rows(assign_credit(method, scored), batch)
    near = 1e-4 if method == "policy_divergence" else 2e-5  # differences of float32 log-probs of two passes
    for got, row in zip(stored(meta, "advantages"), wanted, strict=True):
        torch.testing.assert_close(got, row, atol=near, rtol=near)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "`adapter_residuals`, and the policy has no adapter: actor_rollout_ref.model.lora_rank=0"),
        (("actor_rollout_ref.model.lora_adapter_path=adapter",), "no adapter: actor_rollout_ref.model.lora_rank=0"),
        (("actor_rollout_ref.model.lora.rank=4",), "no adapter: actor_rollout_ref.model.lora_rank=0"),
        ((LORA, "actor_rollout_ref.actor.strategy=megatron"), "got actor_rollout_ref.actor.strategy=megatron"),
        ((LORA, "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"), "ulysses_sequence_parallel_size=2"),
        ((LORA, "+credit.timing=update"), "got credit.timing='update'"),
        ((LORA, "+credit.collectors.entropies.layer=2"), "credit.collectors entry"),
        ((LORA, "+credit.collectors.adapter_residuals.layer=head"), "head"),
        ((LORA, "+credit.collectors.adapter_residuals=mine:residuals"), "works with TRL alone"),
    ],
)
def test_what_cannot_work_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(TokenCreditError) as raised:
        build_trainer(credit_config("+credit.method=arca", *overrides))
    assert message in str(raised.value)


def test_workers_that_did_not_answer_are_named(store: None) -> None:
    meta = store_batch(sampled(seed=6))
    with pytest.raises(TokenCreditError, match="verl's workers stored no `tokencredit_attention_entropies`"):
        verl_signals.keep_response(meta.keys, PARTITION, {"attention_entropies": "attention_entropies"})
