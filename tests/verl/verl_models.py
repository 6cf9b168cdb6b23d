"""A tiny LoRA model, and what our collectors say of it."""

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tokencredit.collect.adapter_residual import adapter_residuals
from tokencredit.collect.attention.entropies import attention_entropies


def tiny(seed: int = 0, folder: Path | None = None, **changes: Any) -> Any:
    """A LoRA model whose adapter does something; in `folder` as verl loads it, the adapter below."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = Qwen3ForCausalLM(Qwen3Config(**shape | heads | changes))
    if folder is not None:
        model.save_pretrained(folder)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if folder is not None:
        model.save_pretrained(folder / "adapter")
    return model.eval()


def collected(model: Any, ids: list[torch.Tensor], lengths: list[int], shape: Any) -> dict[str, torch.Tensor]:
    """The pure functions on rows of a prompt and so many response tokens, each by itself."""
    names = ("old_logprobs", "ref_logprobs", "entropies", "attention_entropies", "adapter_residuals")
    found = {name: torch.zeros(shape) for name in names}
    for row, (tokens, length) in enumerate(zip(ids, lengths, strict=True)):
        start = len(tokens) - length
        logprobs = model(tokens[None]).logits[0, start - 1 : -1].detach().log_softmax(-1)
        found["old_logprobs"][row, :length] = logprobs.gather(1, tokens[start:, None])[:, 0]
        found["entropies"][row, :length] = -(logprobs.exp() * logprobs).sum(-1)
        residuals, reference = adapter_residuals(model, tokens[None], None, start, length, ref_temperature=1.0)
        found["adapter_residuals"][row, :length], found["ref_logprobs"][row, :length] = residuals[0], reference[0]
        found["attention_entropies"][row, :length] = attention_entropies(model, tokens[None], None, start, length)[0]
    return found
