"""Exact values are those of plain rows on models that do not see the whole sequence, or not in the usual way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from exact_setup import EOS

from tokencredit.collect.exact.gradient import score_gradients, trainable
from tokencredit.collect.exact.packing import within_windows
from tokencredit.collect.exact.score import can_pack, fits_packed
from tokencredit.collect.exact.trie import build_trie
from tokencredit.collect.exact.values import exact_credit

SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": EOS,
}  # fmt: skip
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
W = 9  # tokens that a layer sees
MODELS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**SHAPE, sliding_window=W)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**SHAPE, **MOE, sliding_window=W)),
    "phi3": lambda: T.Phi3ForCausalLM(T.Phi3Config(**SHAPE, sliding_window=W)),
    "starcoder2": lambda: T.Starcoder2ForCausalLM(T.Starcoder2Config(**SHAPE, sliding_window=W)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SHAPE, sliding_window=W, head_dim=8)),
    "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**SHAPE, sliding_window=W, head_dim=8)),
    "qwen2": lambda: T.Qwen2ForCausalLM(
        T.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=W, max_window_layers=1)
    ),
    "cohere2": lambda: T.Cohere2ForCausalLM(T.Cohere2Config(**SHAPE, sliding_window=W)),
    "gpt_oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(
            **SHAPE, **MOE, sliding_window=W, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        )
    ),
    "llama4": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(**SHAPE, **MOE, attention_chunk_size=W, intermediate_size_mlp=24, head_dim=8)
    ),
    "gpt_neo": lambda: T.GPTNeoForCausalLM(
        T.GPTNeoConfig(
            vocab_size=20, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=64, window_size=W,
            attention_types=[[["global", "local"], 1]], bos_token_id=EOS, eos_token_id=EOS,
        )
    ),
    "recurrent_gemma": lambda: T.RecurrentGemmaForCausalLM(
        T.RecurrentGemmaConfig(**SHAPE, lru_width=16, attention_window_size=W, logits_soft_cap=8.0)
    ),
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(vocab_size=20, hidden_size=16, n_layer=2, n_head=2)),
}  # fmt: skip
RESPONSES = [[3, 4, 5, EOS], [3, 4, 6, 7, EOS], [9, EOS]]


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    return model


def prompt_of(length: int) -> list[int]:
    return [2 + (place * 7) % 18 for place in range(length)]


def alone(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """ln π of a response from a plain forward over it."""
    logprobs = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).sum()


@pytest.mark.parametrize("length", [3, 11, 30])
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_plain_rows(name: str, length: int) -> None:
    model, prompt = build(name), prompt_of(length)
    found = exact_credit(model, [prompt], [RESPONSES], eos_token_id=EOS)
    with torch.no_grad():
        wanted = sum(float(alone(model, prompt, response).exp()) for response in RESPONSES)
    assert float(found.prompt_values[0]) == pytest.approx(wanted, rel=2e-5)


def test_prompts_on_both_sides_of_a_window_go_together() -> None:
    model = build("mistral")
    prompts = [prompt_of(length) for length in (2, 25, 4)]
    found = exact_credit(model, prompts, [RESPONSES, RESPONSES[:2], RESPONSES[1:]], eos_token_id=EOS)
    packed = [fits_packed(model, prompt, found.trie, number) for number, prompt in enumerate(prompts)]
    assert packed == [True, False, True]  # 2 + 5, 25 + 5 and 4 + 5 tokens, nine are seen
    for number, (prompt, rows) in enumerate(zip(prompts, (RESPONSES, RESPONSES[:2], RESPONSES[1:]), strict=True)):
        single = exact_credit(model, [prompt], [rows], eos_token_id=EOS)
        assert float(found.prompt_values[number]) == pytest.approx(float(single.prompt_values[0]), rel=1e-5)


@pytest.mark.parametrize("name", ["mistral", "llama4"])
def test_gradients_are_those_of_plain_rows(name: str) -> None:
    model, prompt = build(name), prompt_of(20)
    trie = build_trie([RESPONSES])
    weights = torch.zeros(1, trie.parent.numel() - 1, dtype=torch.float64)
    weights[0, trie.paths[1][trie.paths[1] > 0] - 1] = 1.0  # ∇ ln π of the second response
    found = score_gradients(model, prompt, trie, 0, weights)[0]
    wanted = torch.autograd.grad(
        alone(model, prompt, RESPONSES[1]), trainable(model), allow_unused=True, materialize_grads=True
    )
    wanted = torch.cat([part.reshape(-1) for part in wanted])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_windows_are_read_from_configs() -> None:
    base = T.LlamaConfig(**SHAPE)
    assert within_windows(base, 1000, 2000)
    assert within_windows(T.Qwen3Config(**SHAPE, use_sliding_window=False, sliding_window=4), 1000, 2000)
    mistral = T.MistralConfig(**SHAPE, sliding_window=16)
    assert within_windows(mistral, 16, 400) and not within_windows(mistral, 17, 17)
    base.block_window = 16  # under a name that we do not know: the whole packed row must fit
    assert within_windows(base, 10, 16) and not within_windows(base, 10, 17)
    base = T.LlamaConfig(**SHAPE)
    base.layer_types = ["full_attention", "conv"] * 2
    assert not within_windows(base, 2, 2)


def test_low_ids_that_are_special_do_not_decide() -> None:
    class Sinks(T.LlamaForCausalLM):
        """Ids below 3 give logits so large that any two layouts differ on them."""

        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids=input_ids, **kwargs)
            noise = (input_ids < 3).any() * float(kwargs.get("attention_mask") is not None)
            output.logits = output.logits + noise * torch.arange(output.logits.shape[-1])
            return output

    model = Sinks(T.LlamaConfig(**SHAPE)).eval()
    assert not can_pack(Sinks(T.LlamaConfig(**SHAPE)).eval(), [0, 1, 2], [2, 1])
    assert fits_packed(model, prompt_of(5)[1:], build_trie([[[3, 4, 5], [3, 6, 7]]]), 0)


def test_train_mode_is_left_and_comes_back() -> None:
    config = T.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.5, attn_pdrop=0.5
    )
    model = T.GPT2LMHeadModel(config).eval()
    wanted = exact_credit(model, [prompt_of(4)], [RESPONSES], eos_token_id=EOS)
    model.train()
    model.transformer.h[0].eval()  # a part that the user keeps in eval mode
    state = torch.get_rng_state()
    found = exact_credit(model, [prompt_of(4)], [RESPONSES], eos_token_id=EOS)
    assert torch.equal(found.nodes.log_values, wanted.nodes.log_values)
    assert model.training and not model.transformer.h[0].training and model.transformer.h[1].training
    assert torch.equal(torch.get_rng_state(), state)
