from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tokencredit.errors import TokenCreditError
from tokencredit.lab.model import build_model, build_tokenizer
from tokencredit.lab.sampler import Samples, end_ids, is_lab_model, sample, unsupported

PAD, EOS, VOCAB = 0, 1, 12
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def make_model(family: str = "qwen3") -> torch.nn.Module:
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE)) if family == "qwen3" else LlamaForCausalLM(LlamaConfig(**SHAPE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # away from the initial norms of 1 and tiny logits
            parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.15))
    return model.eval()


def prompts() -> tuple[Tensor, Tensor]:
    """Four prompts of 5, 2, 4 and 1 tokens, padded on the left."""
    ids = torch.tensor([[4, 9, 3, 7, 5], [PAD, PAD, PAD, 6, 8], [PAD, 2, 10, 11, 4], [PAD, PAD, PAD, PAD, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    return ids, mask


def draw(model: torch.nn.Module, seed: int = 0, **changes: object) -> Samples:
    ids, mask = prompts()
    settings = {"max_new_tokens": 14, "eos_token_id": EOS, "num_return": 6, "temperature": 0.8} | changes
    return sample(model, ids, mask, generator=torch.Generator().manual_seed(seed), **settings)


def teacher_forced(
    model: torch.nn.Module, samples: Samples, repeats: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    ids, mask = (x.repeat_interleave(repeats, 0) for x in prompts())
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat((ids, samples.ids), 1), attention_mask=torch.cat((mask, samples.mask.long()), 1)
        ).logits
    logprobs = torch.log_softmax(logits[:, ids.shape[1] - 1 : -1].double() / temperature, -1)
    chosen = logprobs.gather(-1, samples.ids[..., None]).squeeze(-1)
    return chosen.float(), -(logprobs.exp() * logprobs).sum(-1).float()


def assert_scores_match(model: torch.nn.Module, samples: Samples, repeats: Tensor, temperature: float) -> None:
    logprobs, entropies = teacher_forced(model, samples, repeats, temperature)
    zero = torch.zeros(())
    torch.testing.assert_close(samples.logprobs, torch.where(samples.mask, logprobs, zero), rtol=0, atol=1e-5)
    torch.testing.assert_close(samples.entropies, torch.where(samples.mask, entropies, zero), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_greedy_output_is_that_of_generate(family: str) -> None:
    model = make_model(family)
    ids, mask = prompts()
    expected = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=14, do_sample=False, pad_token_id=PAD, eos_token_id=EOS
    )[:, ids.shape[1] :]
    samples = draw(model, temperature=0.0, num_return=1)
    assert len(expected.unique()) > 3
    torch.testing.assert_close(samples.ids, expected)
    assert_scores_match(model, samples, torch.tensor([1, 1, 1, 1]), 1.0)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_logprobs_and_entropies_are_those_of_a_teacher_forced_forward(family: str) -> None:
    model = make_model(family)
    samples = draw(model)
    lengths = samples.mask.sum(1)
    assert lengths.min() < lengths.max()  # rows ended at different steps, so the cache was compacted
    assert_scores_match(model, samples, torch.full((4,), 6), 0.8)


def test_mask_ends_with_the_end_token_and_padding_follows() -> None:
    samples = draw(make_model(), num_return=20)
    for ids, mask in zip(samples.ids, samples.mask, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert EOS not in ids[: length - 1]
        assert length == len(mask) or ids[length - 1] == EOS
        assert (ids[length:] == PAD).all()
    assert samples.mask.any(0).all()  # no column that nobody uses


def test_any_of_several_end_tokens_ends_a_row() -> None:
    samples = draw(make_model(), num_return=20, eos_token_id=[EOS, 7])
    ended = samples.mask.sum(1) < samples.mask.shape[1]
    last = samples.ids.gather(1, samples.mask.sum(1, keepdim=True) - 1).squeeze(1)[ended]
    assert set(last.tolist()) == {EOS, 7}


def test_same_generator_same_samples() -> None:
    model = make_model()
    first, again, other = draw(model, 5), draw(model, 5), draw(model, 6)
    for name in ("ids", "mask", "logprobs", "entropies"):
        torch.testing.assert_close(getattr(first, name), getattr(again, name), rtol=0, atol=0)
    assert first.ids.shape != other.ids.shape or (first.ids != other.ids).any()


def test_a_row_does_not_depend_on_when_others_end() -> None:
    model = make_model()
    dropped = draw(model, num_return=20)
    kept = draw(model, num_return=20, eos_token_id=VOCAB + 1)  # nobody ends, so no row is ever dropped
    torch.testing.assert_close(
        torch.where(dropped.mask, kept.ids[:, : dropped.ids.shape[1]], PAD), dropped.ids, rtol=0, atol=0
    )


def test_responses_to_one_prompt_are_adjacent_and_counts_may_differ() -> None:
    samples = draw(make_model(), num_return=[3, 0, 1, 2])
    assert len(samples.ids) == 6
    assert_scores_match(make_model(), samples, torch.tensor([3, 0, 1, 2]), 0.8)


def test_samples_follow_the_softmax() -> None:
    model = make_model()
    ids = torch.tensor([[4, 9, 3]])
    with torch.no_grad():
        probs = torch.softmax(model(input_ids=ids).logits[0, -1].double() / 1.5, -1)
    count = 20_000
    samples = sample(
        model,
        ids,
        torch.ones_like(ids),
        max_new_tokens=1,
        temperature=1.5,
        eos_token_id=EOS,
        generator=torch.Generator().manual_seed(11),
        num_return=count,
    )
    observed = torch.bincount(samples.ids[:, 0], minlength=VOCAB).double()
    chi_square = ((observed - count * probs).square() / (count * probs)).sum()
    assert (count * probs).min() > 5
    assert chi_square < 31.26  # 0.999 quantile of chi-square with 11 degrees of freedom
    assert chi_square > 1.02  # 0.00005 quantile: samples that follow it too closely are no samples


def test_weights_are_read_at_each_call() -> None:
    model = make_model()
    before = draw(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(-3)
    after = draw(model)
    assert_scores_match(model, after, torch.full((4,), 6), 0.8)
    assert before.ids.shape != after.ids.shape or (before.ids != after.ids).any()


def test_active_lora_adapters_count() -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(make_model(), LoraConfig(r=2, lora_alpha=4, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    samples = draw(model)
    assert_scores_match(model, samples, torch.full((4,), 6), 0.8)
    with model.disable_adapter():
        plain = draw(model)
        assert_scores_match(model, plain, torch.full((4,), 6), 0.8)
    assert plain.ids.shape != samples.ids.shape or (plain.ids != samples.ids).any()


def test_what_the_loop_does_not_know_is_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1))
    sliding = Qwen3ForCausalLM(Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=0))
    dora = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    assert unsupported(make_model()) is None
    assert "'gpt2'" in str(unsupported(gpt2))
    assert "sliding" in str(unsupported(sliding))
    assert "LoRA" in str(unsupported(dora))
    with pytest.raises(TokenCreditError, match="generate"):
        draw(gpt2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "norm"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, "mlp"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, "embed_tokens"),
    ],
)
def test_an_adapter_beside_the_projections_is_left_to_the_host(settings: dict, named: str) -> None:
    model = get_peft_model(make_model(), LoraConfig(r=2, **settings))
    assert f"{named} is a peft." in str(unsupported(model))
    with pytest.raises(TokenCreditError, match=named):
        draw(model)


def test_soft_prompts_and_replaced_modules_are_left_to_the_host() -> None:
    soft = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "virtual tokens" in str(unsupported(soft))

    class Louder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * x

    model = make_model()
    model.model.norm = Louder()
    assert "model.norm is a" in str(unsupported(model))


def test_the_labs_models_are_known_by_their_config(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("0123456789+=")
    model = build_model(tokenizer, layers=1, width=16, heads=2)
    model.save_pretrained(tmp_path)
    assert is_lab_model(model)
    assert is_lab_model(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")))
    assert is_lab_model(Qwen3ForCausalLM.from_pretrained(tmp_path))
    assert not is_lab_model(make_model())
    assert not is_lab_model(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("declared", "own", "expected"),
    [([2, 0], 2, [2, 0]), (5, 2, [2, 5]), (None, 2, [2]), ([7], None, [7]), (2, 2, [2])],
)
def test_every_id_that_ends_a_response_counts(declared: Any, own: int | None, expected: list[int]) -> None:
    model = make_model()
    model.generation_config.eos_token_id = declared
    tokenizer = SimpleNamespace(eos_token_id=own)
    assert end_ids(model, tokenizer) == expected
    assert end_ids(model, SimpleNamespace(tokenizer=tokenizer, eos_token_id=99)) == expected  # a processor
    if declared is None:
        with pytest.raises(TokenCreditError, match="ends a response"):
            end_ids(model, SimpleNamespace(eos_token_id=None))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_temperature_is_checked(temperature: float) -> None:
    with pytest.raises(TokenCreditError, match="temperature"):
        draw(make_model(), temperature=temperature)


def test_right_padding_is_refused() -> None:
    ids, mask = prompts()
    with pytest.raises(TokenCreditError, match="left"):
        sample(
            make_model(),
            ids,
            mask.flip(1),
            max_new_tokens=2,
            eos_token_id=EOS,
            generator=torch.Generator().manual_seed(0),
        )


def test_broken_weights_are_reported() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(TokenCreditError, match="not finite"):
        draw(model)
