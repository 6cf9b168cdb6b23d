"""Log-probs and entropies of responses against the logits of real small models."""

import logging
from typing import Any

import pytest
import torch
import transformers

from tokencredit.collect.logprobs import token_logprobs
from tokencredit.errors import TokenCreditError

PROMPT, RESPONSE = 5, 9
SIZE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {}),
    "tied llama": ("Llama", {"tie_word_embeddings": True}),
    "gemma2 with a soft-cap": ("Gemma2", {"final_logit_softcapping": 1.5}),
    "cohere with a logit scale": ("Cohere", {"logit_scale": 0.25}),
    "granite with a logit divisor": ("Granite", {"logits_scaling": 3.0}),
}


def build(name: str) -> Any:
    family, options = MODELS[name]
    torch.manual_seed(3)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZE | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 60, (4, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, -4:] = 0
    return ids, mask


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_logits_of_the_model(name: str, temperature: float) -> None:
    model, (ids, mask) = build(name), batch()
    model.eval()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, PROMPT - 1 : -1].double() / temperature
    everything = torch.log_softmax(logits, -1)
    model.train()
    logprobs, entropies = token_logprobs(model, ids, mask, PROMPT, RESPONSE, temperature)
    assert model.training and not logprobs.requires_grad
    real = mask[:, PROMPT:].bool()
    wanted = everything.gather(2, ids[:, PROMPT:, None])[..., 0]
    torch.testing.assert_close(logprobs[real].double(), wanted[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        entropies[real].double(), torch.special.entr(everything.exp()).sum(-1)[real], rtol=1e-5, atol=1e-5
    )
    assert float(wanted[real].std()) > 0.05


def test_passes_of_few_rows_give_the_same() -> None:
    model, (ids, mask) = build("qwen3"), batch()
    whole = token_logprobs(model, ids, mask, PROMPT, RESPONSE)
    parts = token_logprobs(model, ids, mask, PROMPT, RESPONSE, rows_per_pass=3)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_is_off() -> None:
    model = build("qwen3")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    ids, mask = batch()
    first, second = (token_logprobs(model, ids, mask, PROMPT, RESPONSE)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_the_tiled_head_cannot_read_is_refused() -> None:
    ids, mask = batch()
    model = build("qwen3")
    with pytest.raises(TokenCreditError, match="do not fit a sequence of 14"):
        token_logprobs(model, ids, mask, PROMPT, RESPONSE + 1)
    model.lm_head = torch.nn.Linear(32, 60, bias=True)
    with pytest.raises(TokenCreditError, match="bias"):
        token_logprobs(model, ids, mask, PROMPT, RESPONSE)
    with pytest.raises(TokenCreditError, match="no output embeddings"):
        token_logprobs(model.model, ids, mask, PROMPT, RESPONSE)
