"""Passes of our own run as TRL's do: what is equal differs by exactly 0, and images reach every pass."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel
from trl_setup import ALPHABET, config, trainer
from vision_setup import vision_model, vision_processor, vision_rows

from tokencredit import TokenCreditError
from tokencredit.adapters.trl.collectors import built_in
from tokencredit.adapters.trl.passes import Positioned
from tokencredit.adapters.trl.trainer import CreditGRPOTrainer
from tokencredit.batch.store import RecordStore
from tokencredit.collect.adapter_residual import reference_logprobs
from tokencredit.collect.generate import pad_left
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.collect.models import backbone_of, is_sharded
from tokencredit.collect.rollout import Rollout
from tokencredit.collect.table import resolve_options
from tokencredit.lab.model import build_model, build_tokenizer

LORA = LoraConfig(r=2, target_modules="all-linear")
MICRO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def run(folder: Path, credit: Any, settings: dict[str, Any], **extra: Any) -> tuple[Any, list]:
    built = trainer(
        CreditGRPOTrainer, config(folder / "out", **settings), credit=credit, records=folder / "records", **extra
    )
    built.train()
    return built, list(RecordStore(folder / "records"))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("settings", [{}, MICRO])
def test_a_fresh_adapter_is_its_own_reference_to_the_bit(bf16: bool, settings: dict, tmp_path: Path) -> None:
    _, (first, second) = run(
        tmp_path, "policy_divergence", {"bf16": bf16, "max_steps": 2, **settings}, peft_config=LORA
    )
    mask = first.batch.response_mask
    assert torch.equal(first.batch.old_logprobs[mask], first.batch.ref_logprobs[mask])
    uniform = torch.where(mask, first.batch.host_advantages[:, None], 0.0)
    torch.testing.assert_close(first.advantages, uniform, rtol=1e-6, atol=1e-6)
    gap = (second.batch.old_logprobs - second.batch.ref_logprobs)[second.batch.response_mask].abs()
    assert float(gap.max()) > 1e-4, "after a step the adapter has moved the policy"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("weights", ["frozen", "base"])
def test_a_teacher_that_is_the_policy_gives_no_credit_at_the_start(bf16: bool, weights: str, tmp_path: Path) -> None:
    teacher = {"kind": "self", "weights": weights}
    settings = {"bf16": bf16, "max_steps": 2, **MICRO}
    _, (first, second) = run(tmp_path, "0.5 * grpo + 0.5 * opd", settings, teacher=teacher, peft_config=LORA)
    mask = first.batch.response_mask
    assert torch.equal(first.batch.teacher_logprobs[mask], first.batch.old_logprobs[mask])
    gap = (second.batch.teacher_logprobs - second.batch.old_logprobs)[second.batch.response_mask]
    assert float(gap.abs().max()) > 1e-4


def test_rows_without_an_attempt_are_scored_as_the_student(tmp_path: Path) -> None:
    """Sibling template: a row without a better attempt keeps its own prompt, and then the teacher is the student."""
    teacher = {"kind": "self", "template": "{attempt}{prompt}"}

    def one_is_right(completions: list[str], **_: Any) -> list[float]:
        return [float(row % 4 == 0) for row in range(len(completions))]

    settings = {"max_steps": 1, **MICRO}
    _, (first,) = run(tmp_path, "opd", settings, teacher=teacher, reward_funcs=one_is_right)
    gap = torch.where(first.batch.response_mask, first.batch.teacher_logprobs - first.batch.old_logprobs, 0.0)
    assert [bool((row != 0).any()) for row in gap] == [False, True, True, True] * 2


def test_a_privileged_prompt_is_scored_as_if_it_stood_alone(tmp_path: Path) -> None:
    """GPT-2's positions are absolute: padding before a shorter prompt must not move them."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    rows = [[3, 4, 5, 6, 7, 8, 9], [3, 4, 5]]
    ids, mask = pad_left(rows, torch.device("cpu"))
    with torch.no_grad():
        padded = Positioned(model)(input_ids=ids, attention_mask=mask.long()).logits[1, -3:]
        alone = model(input_ids=torch.tensor(rows[1:])).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


def test_own_passes_take_micro_batches_and_the_hosts_precision(tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []
    settings = {"max_steps": 1, "bf16": True, **MICRO}
    built = trainer(CreditGRPOTrainer, config(tmp_path, **settings), credit="attention_illuminates")
    plain = built.collectors["attention_distances"]

    def watched(rollout: Rollout) -> torch.Tensor:
        backbone = backbone_of(rollout.model)
        note = backbone.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((len(kwargs["input_ids"]), torch.is_autocast_enabled("cpu"))),
            with_kwargs=True,
        )
        found = plain(rollout)
        note.remove()
        return found

    built.collectors["attention_distances"] = watched
    built.train()
    assert seen == [(4, True), (4, True)]


def test_parts_of_a_rollout_join_to_the_whole() -> None:
    tokenizer = build_tokenizer(ALPHABET)
    ids = torch.tensor(tokenizer(["1+2", "3+4", "5+6"])["input_ids"])
    whole = Rollout(
        model=build_model(tokenizer, layers=2, width=32, heads=2, seed=1),
        tokenizer=tokenizer,
        prompt_ids=ids,
        prompt_mask=torch.ones_like(ids, dtype=torch.bool),
        response_ids=ids,
        response_mask=torch.ones_like(ids, dtype=torch.bool),
        rewards=torch.tensor([1.0, 0.0, 0.5]),
        group_ids=torch.tensor([0, 0, 1]),
        columns=[{"n": n} for n in range(3)],
        temperature=1.0,
        rows_per_pass=2,
    )
    parts = list(whole.parts())
    assert [len(part.response_ids) for part in parts] == [2, 1]
    assert [row["n"] for part in parts for row in part.columns] == [0, 1, 2]
    options = resolve_options({"importances": {"tail": 1}})[0]
    collector = built_in(options, None, adapter=False)["importances"]
    torch.testing.assert_close(collector(whole), torch.cat([collector(part) for part in parts]))


def vision_run(folder: Path, credit: Any, **extra: Any) -> Any:
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 5, "learning_rate": 1e-4}
    timing = extra.pop("timing", "auto")
    built = trainer(
        CreditGRPOTrainer,
        config(folder / "out", **settings),
        model=vision_model(),
        processing_class=vision_processor(),
        train_dataset=vision_rows(),
        reward_funcs=lambda completions, **_: [float(len(str(text)) % 7) for text in completions],
        credit=credit,
        timing=timing,
        records=folder / "records",
        **extra,
    )
    built.train()
    return RecordStore(folder / "records").read(0)


def test_images_reach_the_passes_of_log_probs_and_self_teachers(tmp_path: Path) -> None:
    update = vision_run(tmp_path / "update", "hapo", timing="update")
    rollout = vision_run(tmp_path / "rollout", "hapo", timing="rollout")
    mask = update.batch.response_mask
    assert torch.equal(update.batch.response_ids, rollout.batch.response_ids)
    torch.testing.assert_close(update.batch.entropies[mask], rollout.batch.entropies[mask], rtol=0, atol=1e-6)
    assert "<image>" in update.prompts[0], "prompts in a record keep their special tokens"
    taught = vision_run(tmp_path / "self", "opd", teacher={"kind": "self", "weights": "frozen"})
    assert taught.advantages.abs().max() == 0


def test_images_reach_the_reference_of_an_adapter(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    for credit, field in (("policy_divergence", "ref_logprobs"), ("arca", "adapter_residuals")):
        record = vision_run(tmp_path / credit, credit, peft_config=lora)
        mask = record.batch.response_mask
        value = getattr(record.batch, field)[mask]
        expected = record.batch.old_logprobs[mask] if field == "ref_logprobs" else torch.zeros_like(value)
        assert torch.equal(value, expected), "B = 0: the reference is the policy"


@pytest.mark.parametrize(
    ("credit", "extra", "named"),
    [
        ("attention_illuminates", {}, "the collector of `attention_distances` runs a pass on token ids alone"),
        ("atpo", {}, "the collector of `importances` runs a pass on token ids alone"),
        ("opd", {"teacher": {"kind": "self", "template": "hint"}}, "renders text alone"),
    ],
)
def test_passes_that_cannot_see_an_image_are_refused(credit: str, extra: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(TokenCreditError, match=named):
        vision_run(tmp_path, credit, **extra)


def test_sharded_weights_are_refused_where_a_pass_needs_them_whole() -> None:
    model = torch.nn.Linear(2, 2)
    assert not is_sharded(model)
    model.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks a parameter
    assert is_sharded(model)
    ids, seen = pad_left([[2, 3], [4]], torch.device("cpu"))
    rollout = Rollout(
        model=model,
        tokenizer=None,
        prompt_ids=ids,
        prompt_mask=seen,
        response_ids=ids,
        response_mask=seen,
        rewards=torch.zeros(2),
        group_ids=torch.zeros(2, dtype=torch.long),
        columns=[{}, {}],
        temperature=1.0,
    )
    collectors = built_in(resolve_options({})[0], None, adapter=True)
    for name in ("attention_entropies", "importances", "adapter_residuals", "doubling_ratios"):
        with pytest.raises(TokenCreditError, match=f"the collector of `{name}` runs a pass outside the wrapper"):
            collectors[name](rollout)


def test_the_share_of_responses_without_the_marker_is_logged(tmp_path: Path) -> None:
    options = {"importances": {"after": "="}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a micro-batch may hold no marker at all
        built, (record,) = run(tmp_path, "atpo", {"max_steps": 1, **MICRO}, collectors=options)
    texts = [built.processing_class.decode(ids[mask]) for ids, mask in rows_of(record)]
    share = sum("=" not in text for text in texts) / 8
    (logged,) = [log["credit/importances_without_marker"] for log in built.state.log_history if "loss" in log]
    assert 0 < share < 1
    assert logged == pytest.approx(share)


def rows_of(record: Any) -> Any:
    return zip(record.batch.response_ids, record.batch.response_mask, strict=True)


def test_the_reference_of_a_script_is_the_function_of_the_library(tmp_path: Path) -> None:
    """TRL's head and ours agree to rounding, so either may be used where nothing is subtracted."""
    built, (_, second) = run(tmp_path, "policy_divergence", {"max_steps": 2}, peft_config=LORA)
    batch = second.batch
    assert batch.step == second.step == 1
    ids = torch.tensor(built.processing_class(second.prompts)["input_ids"])
    whole = torch.cat((ids, batch.response_ids), 1)
    mask = torch.cat((torch.ones_like(ids), batch.response_mask.long()), 1)
    span = (whole, mask, ids.shape[1], batch.response_ids.shape[1])
    chosen = batch.response_mask
    torch.testing.assert_close(
        reference_logprobs(built.model, *span)[chosen], batch.ref_logprobs[chosen], rtol=1e-5, atol=1e-5
    )
    assert token_logprobs(built.model, *span)[0].shape == chosen.shape
