"""The parts of a causal language model that collectors need: backbone, head, readout, and a pass in eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tokencredit.collect.head_tiles import Readout
from tokencredit.errors import TokenCreditError


def unwrapped(model: nn.Module) -> Any:
    """The model inside data-parallel wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def causal_of(model: nn.Module) -> Any:
    """The causal language model inside wrappers and PEFT."""
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def backbone_of(model: nn.Module) -> Any:
    """The causal model without its head: hidden states, no logits."""
    causal = causal_of(model)
    backbone = getattr(causal, "base_model", causal)
    decoder = getattr(backbone, "language_model", None)  # vision-language models nest the text decoder
    return decoder if isinstance(decoder, nn.Module) else backbone


def head_of(model: nn.Module, temperature: float = 1.0) -> tuple[Float[Tensor, "vocab hidden"], Readout]:
    """The output matrix and how its logits are read: scale, soft-cap, temperature."""
    causal = causal_of(model)
    head = causal.get_output_embeddings()
    if head is None:
        raise TokenCreditError(f"{type(causal).__name__} has no output embeddings", hint="give a causal language model")
    if hasattr(head, "lora_A") or hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise TokenCreditError(
            "the output head is wrapped by an adapter, so its weight alone does not give the logits",
            hint="leave `lm_head` out of the adapter's target_modules and modules_to_save",
        )
    if getattr(head, "bias", None) is not None:
        raise TokenCreditError(
            "the output head has a bias, which the tiled head does not read", hint="take log-probs from the host's pass"
        )
    config = causal.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return head.weight, Readout(temperature, scale, getattr(config, "final_logit_softcapping", None))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module trains or not as it did before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def check_span(prompt_length: int, response_length: int, sequence: int) -> None:
    """Responses lie inside the sequence, and something predicts their first token."""
    if prompt_length < 1 or prompt_length + response_length > sequence:
        raise TokenCreditError(
            f"a prompt of {prompt_length} and a response of {response_length} columns do not fit a sequence of "
            f"{sequence} tokens",
            hint="lengths are columns of `input_ids`, padding included; a prompt has at least one token",
        )


def final_norm_of(backbone: nn.Module) -> nn.Module:
    """The norm after the last decoder layer."""
    for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
        if isinstance(getattr(backbone, name, None), nn.Module):
            return getattr(backbone, name)
    raise TokenCreditError(
        f"{type(backbone).__name__} has no final norm that we know", hint="use layer='last_postnorm'"
    )


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    for name in ("layers", "h", "blocks"):
        if isinstance(getattr(backbone, name, None), nn.ModuleList):
            return list(getattr(backbone, name))
    raise TokenCreditError(f"{type(backbone).__name__} has no list of layers that we know", hint="use 'last_postnorm'")
