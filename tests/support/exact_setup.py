"""Models, prompts and a small world that the tests of exact credit share; no training, no downloads."""

from functools import cache
from itertools import product

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tokencredit.collect.exact.score import in_float64
from tokencredit.collect.exact.values import ExactCredit, exact_credit
from tokencredit.seeds import derive

VOCABULARY, EOS = 6, 1  # id 0 is padding; 2 … 5 are letters
PROMPTS = [[2, 3], [4], [5, 5, 2], [3, 2]]
ACCEPTED = [
    [[2, 3, EOS], [2, 4, EOS], [2, 4, 4, EOS], [5, EOS], [EOS]],  # forks at every depth, and the empty text
    [[3, 3, 3, EOS]],
    [],  # nothing is right
    [[letter, other, EOS] for letter, other in product(range(2, 6), repeat=2)],
]


@cache
def tiny_model(kind: str = "qwen3", dtype: torch.dtype = torch.float64, scale: float = 6.0) -> torch.nn.Module:
    """A random model, its head scaled up so that it is far from uniform."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {**shape, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("exact tests", kind))
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64))
        else:
            config, make = (Qwen3Config, Qwen3ForCausalLM) if kind == "qwen3" else (LlamaConfig, LlamaForCausalLM)
            model = make(config(**rope, pad_token_id=0, bos_token_id=None, eos_token_id=EOS))
    model = model.eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name and "wte" not in name:
                parameter.mul_(4.0)
    return in_float64(model) if dtype == torch.float64 else model


@cache
def tiny_credit(kind: str = "qwen3", dtype: torch.dtype = torch.float64) -> ExactCredit:
    """Exact credit of `tiny_model` on `PROMPTS`."""
    return exact_credit(tiny_model(kind, dtype), PROMPTS, ACCEPTED, eos_token_id=EOS)


@torch.no_grad()
def next_probs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """π(· | ids) by one plain forward."""
    return model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)


def probability(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """π(response | prompt), token by token, one forward each."""
    total = 1.0
    for step, token in enumerate(response):
        total *= float(next_probs(model, prompt + response[:step])[token])
    return total


def value_by_hand(model: torch.nn.Module, prompt: int, prefix: list[int]) -> float:
    """V of a prefix from its definition."""
    return sum(
        probability(model, PROMPTS[prompt] + prefix, c[len(prefix) :])
        for c in ACCEPTED[prompt]
        if c[: len(prefix)] == prefix
    )


def sampled(prompts: int, rows: int, seed: int, length: int = 6) -> list[list[list[int]]]:
    """Responses from `tiny_model`, cut off after `length` tokens."""
    rng = torch.Generator().manual_seed(derive("exact tests", "rollouts", seed))
    found = []
    for prompt in PROMPTS[:prompts]:
        texts = []
        for _ in range(rows):
            text: list[int] = []
            while len(text) < length and EOS not in text:
                text.append(int(torch.multinomial(next_probs(tiny_model(), prompt + text), 1, generator=rng)))
            texts.append(text)
        found.append(texts)
    return found
