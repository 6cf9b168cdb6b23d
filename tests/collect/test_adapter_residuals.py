"""Adapter residuals of real PEFT models: values, layers, what is shared with the reference, and what is refused."""

import copy
import logging
from typing import Any

import peft
import pytest
import torch
import transformers

from tokencredit.collect.adapter_residual import (
    adapter_residuals,
    capture_states,
    doubling_ratio,
    policy_residuals,
    reference_pass,
)
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.collect.models import head_of
from tokencredit.errors import TokenCreditError

PROMPT, RESPONSE = 5, 9
SPAN = (PROMPT, RESPONSE)


def base_model() -> Any:
    torch.manual_seed(3)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.Qwen3Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.Qwen3ForCausalLM(config)


def lora_model(trained: bool = True, **options: Any) -> Any:
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(
        base_model(), peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=targets, **options)
    )
    if trained:
        train(model, "default")
    return model


def train(model: Any, adapter: str) -> None:
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=g))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 60, (4, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, -4:] = 0
    return ids, mask


@torch.no_grad()
def all_states(model: Any, ids: torch.Tensor, mask: torch.Tensor, off: bool) -> tuple[torch.Tensor, ...]:
    """Embeddings, decoder layers, and the last one after the final norm, by transformers' own recorder."""
    model.eval()
    if not off:
        return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    with model.disable_adapter():
        return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states


def test_residual_is_the_norm_of_the_difference_at_the_predicting_positions() -> None:
    model, (ids, mask) = lora_model(), batch()
    adapted, base = all_states(model, ids, mask, False)[-1], all_states(model, ids, mask, True)[-1]
    wanted = (adapted - base).norm(dim=-1)[:, PROMPT - 1 : -1]
    model.train()
    found, none = adapter_residuals(model, ids, mask, *SPAN)
    torch.testing.assert_close(found, wanted)
    assert none is None
    assert float(wanted.std()) > 0.01
    assert model.training  # and dropout, on again now, was off: the values above are exact


def test_layers() -> None:
    model, (ids, mask) = lora_model(), batch()
    rows = slice(PROMPT - 1, -1)
    hooked: list[torch.Tensor] = []
    norm = model.get_base_model().model.norm
    handle = norm.register_forward_pre_hook(lambda module, args: hooked.append(args[0][:, rows]))
    states = [all_states(model, ids, mask, off) for off in (False, True)]
    handle.remove()
    prenorm = (hooked[0] - hooked[1]).norm(dim=-1)
    torch.testing.assert_close(adapter_residuals(model, ids, mask, *SPAN, layer="last_prenorm")[0], prenorm)
    relative = adapter_residuals(model, ids, mask, *SPAN, layer="last_prenorm_relative")[0]
    torch.testing.assert_close(relative, prenorm / hooked[1].norm(dim=-1))
    # transformers records layers 1 and 2 and, in the place of 3, what comes after the norm
    early = [(a - b)[:, rows].norm(dim=-1) for a, b in zip(states[0][1:-1], states[1][1:-1], strict=True)]
    mean = torch.stack([*early, prenorm]).mean(0)
    torch.testing.assert_close(adapter_residuals(model, ids, mask, *SPAN, layer="mean_all")[0], mean)


def test_an_adapter_that_does_nothing_has_residual_zero() -> None:
    model, (ids, mask) = lora_model(trained=False), batch()
    assert float(adapter_residuals(model, ids, mask, *SPAN)[0].abs().max()) == 0.0
    assert doubling_ratio(model, ids, mask, *SPAN) != doubling_ratio(model, ids, mask, *SPAN)  # NaN: nothing to double


def test_reference_log_probs_come_from_the_same_pass() -> None:
    model, (ids, mask) = lora_model(), batch()
    passes: list[int] = []
    head_of(model)  # compares the head with the model's own logits, once
    handle = model.get_base_model().model.register_forward_hook(lambda module, args, output: passes.append(1))
    _, reference = adapter_residuals(model, ids, mask, *SPAN, ref_temperature=0.7)
    handle.remove()
    assert len(passes) == 2
    with model.disable_adapter():
        wanted, _ = token_logprobs(model, ids, mask, *SPAN, temperature=0.7)
    assert reference is not None and torch.equal(reference, wanted)


def test_full_fine_tuning_is_compared_with_a_frozen_copy() -> None:
    model, (ids, mask) = lora_model(), batch()
    wanted, _ = adapter_residuals(model, ids, mask, *SPAN)
    merged = copy.deepcopy(model).merge_and_unload()
    found, _ = policy_residuals(merged, base_model(), ids, mask, *SPAN)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_reference_adapter_is_preferred_to_the_base() -> None:
    model, (ids, mask) = lora_model(), batch()
    model.add_adapter("ref", model.peft_config["default"])
    train(model, "ref")
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data.copy_(dict(model.named_parameters())[name.replace(".ref.", ".default.")])
    model.set_adapter("default")
    next(p for name, p in model.named_parameters() if ".default." in name).requires_grad_(False)  # frozen by hand
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    residuals, _ = adapter_residuals(model, ids, mask, *SPAN)
    assert float(residuals.abs().max()) == 0.0  # at the start of training the policy is its reference
    assert model.active_adapters == ["default"]
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_tapping_a_host_runs_no_pass() -> None:
    model, (ids, mask) = lora_model(), batch()
    model.eval()
    passes: list[int] = []
    head_of(model)  # compares the head with the model's own logits, once
    handle = model.get_base_model().model.register_forward_hook(lambda module, args, output: passes.append(1))
    with torch.no_grad(), capture_states(model, RESPONSE) as tap:
        for rows in (slice(0, 3), slice(3, 4)):  # a host may score in chunks of rows
            model(ids[rows], attention_mask=mask[rows])
        with reference_pass(model):
            for rows in (slice(0, 3), slice(3, 4)):
                model(ids[rows], attention_mask=mask[rows])
    assert len(passes) == 4
    handle.remove()
    torch.testing.assert_close(tap.residuals(), adapter_residuals(model, ids, mask, *SPAN)[0])
    tap.policy.pop()
    with pytest.raises(TokenCreditError, match="1 and 2"):
        tap.residuals()


def test_gradients_are_unchanged_by_a_pass_in_between() -> None:
    def gradients(probe: bool) -> list[torch.Tensor]:
        model, (ids, mask) = lora_model(), batch()
        model.eval()
        loss = model(ids, attention_mask=mask, labels=ids).loss
        if probe:
            adapter_residuals(model, ids, mask, *SPAN)
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    plain, probed = gradients(False), gradients(True)
    assert len(plain) == 18  # three layers, three targets, A and B
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))


def scalings(model: Any) -> list[dict[str, float]]:
    return [dict(module.scaling) for module in model.modules() if hasattr(module, "lora_A")]


def test_doubling_tells_signal_from_rounding() -> None:
    model, (ids, mask) = lora_model(), batch()
    before = [
        dict(module.scaling) for module in model.modules() if hasattr(module, "scaling") and hasattr(module, "lora_A")
    ]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    assert 1.9 < doubling_ratio(model, ids, mask, *SPAN) < 2.1
    after = [
        dict(module.scaling) for module in model.modules() if hasattr(module, "scaling") and hasattr(module, "lora_A")
    ]
    assert before == after
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-3)
    assert doubling_ratio(model.bfloat16(), ids, mask, *SPAN) < 1.8


@pytest.mark.parametrize("strength", [10.0, 60.0])
def test_a_strong_adapter_saturates_and_is_still_signal(strength: float) -> None:
    model, (ids, mask) = lora_model(), batch()
    before = scalings(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(strength)
    base = adapter_residuals(model, ids, mask, *SPAN)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2.0)
        twice = adapter_residuals(model, ids, mask, *SPAN)[0]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    real = mask[:, SPAN[0] : SPAN[0] + SPAN[1]].bool()
    assert float((twice / base)[real].median()) < 1.6  # doubling shows nothing here
    assert 1.8 < doubling_ratio(model, ids, mask, *SPAN) <= 2.1
    assert scalings(model) == before


def test_what_cannot_be_switched_off_is_refused() -> None:
    ids, mask = batch()
    with pytest.raises(TokenCreditError, match="without LoRA layers") as caught:
        adapter_residuals(base_model(), ids, mask, *SPAN)
    assert "policy_residuals" in str(caught.value.hint)
    model = lora_model()
    model.merge_adapter()
    with pytest.raises(TokenCreditError, match="merged") as caught:
        adapter_residuals(model, ids, mask, *SPAN)
    assert "unmerge_adapter" in str(caught.value.hint)
    with pytest.raises(TokenCreditError, match="bias='lora_only'"):
        adapter_residuals(lora_model(bias="lora_only"), ids, mask, *SPAN)


def test_a_trained_head_is_warned_about_and_not_scored() -> None:
    ids, mask = batch()
    model = lora_model(modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="head is trained"):
        adapter_residuals(model, ids, mask, *SPAN)
    with pytest.raises(TokenCreditError, match="wrapped by an adapter"):
        token_logprobs(model, ids, mask, *SPAN)
