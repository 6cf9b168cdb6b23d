"""Scores of a response are those of the model's own logits on that row alone, whatever the model and the batch."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import nn

from tokencredit.collect.adapter_residual import policy_and_reference
from tokencredit.collect.attention.entropies import attention_entropies, attention_layers, full_layers, middle_layer
from tokencredit.collect.attention.rhythms import attention_rhythms
from tokencredit.collect.head.divergence import head_divergence
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.head.objective import head_objective
from tokencredit.collect.logprobs import rows_of, token_logprobs
from tokencredit.collect.models import head_of, is_peft_model
from tokencredit.collect.teacher.model import _swapped
from tokencredit.collect.teacher.score import score_rows
from tokencredit.collect.teacher.states import state_divergences
from tokencredit.errors import TokenCreditError

VOCAB = 48
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GEMMA = {"lru_width": 32, "attention_window_size": 64, "head_dim": 8}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
MODELS: dict[str, Callable[[], Any]] = {
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(**SHAPE, logits_scaling=3.0, embedding_multiplier=4.0)),
    "hyperclovax": lambda: T.HyperCLOVAXForCausalLM(T.HyperCLOVAXConfig(**SHAPE, logits_scaling=0.4)),
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**SHAPE, logit_scale=0.3)),
    "cohere2": lambda: T.Cohere2ForCausalLM(T.Cohere2Config(**SHAPE, logit_scale=2.5, head_dim=8)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0)),
    "falcon_h1": lambda: T.FalconH1ForCausalLM(
        T.FalconH1Config(**SHAPE, **MAMBA, head_dim=8, lm_head_multiplier=2.5, mamba_expand=2)
    ),
    "minicpm3": lambda: T.MiniCPM3ForCausalLM(T.MiniCPM3Config(**{**SHAPE, "num_key_value_heads": 4}, **MLA)),
    "recurrent_gemma": lambda: T.RecurrentGemmaForCausalLM(
        T.RecurrentGemmaConfig(**SHAPE, **GEMMA, logits_soft_cap=1.5)
    ),
    "llama4": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(
            **SHAPE, intermediate_size_mlp=40, head_dim=8, num_local_experts=2, num_experts_per_tok=1
        )
    ),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**GPT)),
    "gpt_bigcode": lambda: T.GPTBigCodeForCausalLM(T.GPTBigCodeConfig(**GPT)),
    "gpt_neo": lambda: T.GPTNeoForCausalLM(
        T.GPTNeoConfig(
            vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]], window_size=4,
        )
    ),
    "rwkv": lambda: T.RwkvForCausalLM(
        T.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, context_length=64)
    ),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    ),
}  # fmt: skip


def build(name: str, scale: float = 4.0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def responses() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Prompts of 2, 11 and 6 tokens, responses of which the last ends early."""
    prompts = [list(range(5, 5 + length)) for length in (2, 11, 6)]
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 5:] = False
    return prompts, ids, mask


@torch.no_grad()
def alone(model: Any, prompt: list[int], ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs from the model's own logits, the row by itself."""
    logits = model(input_ids=torch.tensor([prompt + ids.tolist()])).logits[0].double() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_each_row_alone(name: str) -> None:
    model, (prompts, ids, mask) = build(name), responses()
    wanted = torch.stack([alone(model, prompt, row, 0.7) for prompt, row in zip(prompts, ids, strict=True)])
    found = score_rows(model, prompts, ids, mask, temperature=0.7)
    assert float((found - wanted)[mask].abs().max()) < 1e-4  # float32, logits up to some hundreds
    assert float(found[~mask].abs().max()) == 0.0


@pytest.mark.parametrize("name", ["gpt2", "rwkv", "granite"])
def test_rows_do_not_depend_on_how_many_run_together(name: str) -> None:
    model, (prompts, ids, _) = build(name), responses()
    width = max(map(len, prompts))
    tokens = torch.tensor(
        [[0] * (width - len(prompt)) + prompt + row.tolist() for prompt, row in zip(prompts, ids, strict=True)]
    )
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * (len(prompt) + 7) for prompt in prompts])
    once = token_logprobs(model, tokens, seen, width, 7)
    split = token_logprobs(model, tokens, seen, width, 7, rows_per_pass=2)
    for a, b in zip(once, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_divergences_do_not_depend_on_padding() -> None:
    student, teacher, (prompts, ids, mask) = build("gpt2"), build("gpt2", scale=5.0), responses()
    together = state_divergences(student, teacher, prompts, ids, mask)
    for row, prompt in enumerate(prompts):
        single = state_divergences(student, teacher, [prompt], ids[row : row + 1], mask[row : row + 1])
        torch.testing.assert_close(together[row], single[0], rtol=1e-4, atol=1e-5)


def test_attention_of_learned_positions_does_not_depend_on_padding() -> None:
    model, (prompts, ids, _) = build("gpt2", scale=8.0), responses()
    width, prompt = 11, prompts[0]
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt + ids[0].tolist()])
    seen = (torch.arange(width + 7) >= width - len(prompt)).long()[None]
    together = attention_entropies(model, padded, seen, width, 7)
    by_itself = attention_entropies(model, torch.tensor([prompt + ids[0].tolist()]), None, len(prompt), 7)
    torch.testing.assert_close(together, by_itself, rtol=1e-4, atol=1e-5)


# -- heads that are not known ---------------------------------------------------------------------


class Halved(T.LlamaForCausalLM):
    """Logits that no entry of the config tells of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output


def test_a_head_that_cannot_be_rebuilt_is_refused_by_name() -> None:
    model = Halved(T.LlamaConfig(**SHAPE)).eval()
    for _ in range(2):  # the answer is kept
        with pytest.raises(TokenCreditError, match="logits of Halved cannot be rebuilt"):
            head_of(model)


def test_the_comparison_runs_once_and_leaves_the_model_alone() -> None:
    model = build("granite").train()
    calls: list[int] = []
    model.register_forward_hook(lambda *args: calls.append(1))
    state = torch.get_rng_state()
    for temperature in (1.0, 0.5):
        assert head_of(model, temperature)[1].temperature == temperature
    assert len(calls) == 1 and model.training and torch.equal(torch.get_rng_state(), state)


# -- autocast ---------------------------------------------------------------------


@pytest.mark.parametrize("onednn", [None, False])
@pytest.mark.parametrize("engine", ["recompute", "frozen"])
def test_a_hosts_autocast_does_not_reach_the_head(engine: Any, onednn: bool | None) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 24, generator=rng)
    targets = torch.randint(0, 300, (9,), generator=rng)
    states = torch.randn(9, 24, generator=rng)
    results = []
    for on in (False, True):
        hidden = states.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            parts = head_logprobs(hidden, weight, targets, engine=engine, onednn=onednn)
            plain = head_logprobs(states, weight, targets, onednn=onednn)  # without gradients
            parts[0].sum().backward()
        results.append([*(part.detach() for part in (*parts, *plain)), hidden.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_and_the_other_heads() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 9, 24, generator=rng)
    weight = torch.randn(300, 24, generator=rng)
    targets = torch.randint(0, 300, (9,), generator=rng)
    results = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            divergence = head_divergence((hidden, weight), (other, weight))
            loss = head_objective(hidden, weight, targets, lambda logprobs, entropies, rows: -logprobs)
        results.append([divergence, *loss])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_states_in_16_bits_meet_a_head_in_32() -> None:
    hidden, weight = torch.randn(4, 16).bfloat16(), torch.randn(50, 16)
    found = head_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]))[0]
    wanted = (hidden.float() @ weight.T).log_softmax(-1)[torch.arange(4), torch.tensor([1, 2, 3, 4])]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# -- differences of two passes ---------------------------------------------------------------------


def lora(model: Any, trained: bool) -> Any:
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=not trained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [None, 2])
def test_a_fresh_adapter_is_its_reference_bit_for_bit(autocast: bool, rows: int | None) -> None:
    model = lora(T.LlamaForCausalLM(T.LlamaConfig(**SHAPE)), trained=False).train()
    ids = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(2))
    seen = torch.ones_like(ids)
    seen[0, :4] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        scores = policy_and_reference(model, ids, seen, 6, 10, 0.9, rows_per_pass=rows)
    assert torch.equal(scores.logprobs, scores.ref_logprobs)
    assert model.training
    moved = policy_and_reference(lora(T.LlamaForCausalLM(T.LlamaConfig(**SHAPE)), trained=True), ids, seen, 6, 10)
    assert float((moved.logprobs - moved.ref_logprobs).abs().max()) > 1e-4


def test_swapped_weights_are_used_under_autocast() -> None:
    # autocast keeps 16-bit copies of weights for as long as it is on
    layer = nn.Linear(4, 4, bias=False)
    x = torch.ones(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        with _swapped({"weight": layer.weight}, {"weight": torch.zeros(4, 4)}):
            assert float(layer(x).detach().abs().max()) == 0.0
        assert torch.equal(layer(x), before)


def test_transformers_own_adapters_are_no_peft_model() -> None:
    model = T.LlamaForCausalLM(T.LlamaConfig(**SHAPE))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert hasattr(model, "peft_config") and not is_peft_model(model)
    with pytest.raises(TokenCreditError, match="add_adapter") as refusal:
        policy_and_reference(model, torch.ones(1, 8, dtype=torch.long), None, 4, 4)
    assert "get_peft_model" in str(refusal.value)
    assert is_peft_model(lora(T.LlamaForCausalLM(T.LlamaConfig(**SHAPE)), trained=False))


# -- images ---------------------------------------------------------------------


def llava() -> Any:
    vision = T.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = T.LlamaConfig(**SHAPE)
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_id=40, vision_feature_layer=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T.LlavaForConditionalGeneration(config).eval()


def test_images_are_in_the_pass_or_it_is_refused() -> None:
    model = llava()
    ids = torch.randint(3, 39, (2, 14), generator=torch.Generator().manual_seed(1))
    ids[:, 2:6] = 40  # four patches
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    seen = torch.ones_like(ids)
    with pytest.raises(TokenCreditError, match="image placeholders"):
        token_logprobs(model, ids, seen, 8, 6)
    with pytest.raises(TokenCreditError, match="image placeholders"):
        attention_entropies(model, ids, seen, 8, 6)
    with pytest.raises(TokenCreditError, match="image placeholders"):
        attention_rhythms(model, ids, seen, 8, 6)
    extra = {"pixel_values": pixels}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=seen, pixel_values=pixels).logits.log_softmax(-1)
    wanted = logits[:, 7:13].gather(2, ids[:, 8:, None])[..., 0]
    for rows in (None, 1):
        found = token_logprobs(model, ids, seen, 8, 6, rows_per_pass=rows, extra_inputs=extra)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert attention_entropies(model, ids, seen, 8, 6, extra_inputs=extra).shape == (2, 6)
    text = torch.where(ids == 40, 5, ids)  # without placeholders there is nothing to give
    assert token_logprobs(model, text, seen, 8, 6)[0].shape == (2, 6)


def test_images_of_some_rows() -> None:
    grid = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 4]])  # 4, 8 and 8 patches: one image, then two in one row
    extra = {"image_grid_thw": grid, "pixel_values": torch.arange(20)[:, None], "num_images": [1, 2]}
    part = rows_of(extra, slice(1, 2), 2)
    assert part["image_grid_thw"].tolist() == grid[1:].tolist()
    assert part["pixel_values"][:, 0].tolist() == list(range(4, 20))
    with pytest.raises(TokenCreditError, match="cannot be cut into rows"):
        rows_of({"pixel_values": torch.zeros(20, 3)}, slice(0, 1), 2)


# -- attention layers ---------------------------------------------------------------------


def test_linear_attention_is_not_taken_for_attention() -> None:
    kinds = ["full_attention", "linear_attention", "linear_attention", "linear_attention", "full_attention"]
    shape = {**SHAPE, "num_hidden_layers": 5}
    model = T.MiniMaxForCausalLM(
        T.MiniMaxConfig(
            **shape, head_dim=8, num_local_experts=2, num_experts_per_tok=1, block_size=4, layer_types=kinds
        )
    ).eval()
    assert list(attention_layers(model)) == full_layers(model) == [0, 4]
    assert middle_layer(model) == 0  # 0 and 4 are as near to 2
    with pytest.raises(TokenCreditError, match=r"layer 2 has no attention rows to take; layers that have: \[0, 4\]"):
        attention_entropies(model, torch.ones(1, 8, dtype=torch.long), None, 4, 4, layer=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: T.MptForCausalLM(T.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4)),
        lambda: T.CodeGenForCausalLM(
            T.CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
        ),
        lambda: T.MambaForCausalLM(T.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)),
    ],
)
def test_models_whose_rows_cannot_be_read_are_refused_by_name(make: Callable[[], Any]) -> None:
    model = make().eval()
    with pytest.raises(TokenCreditError, match=f"{type(model).__name__} has no attention layers"):
        attention_entropies(model, torch.ones(1, 8, dtype=torch.long), None, 4, 4)
