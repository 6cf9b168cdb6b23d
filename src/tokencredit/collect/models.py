"""The parts of a causal language model that collectors need: backbone, head, readout, and a pass in eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokencredit.collect.head.tiles import Readout, folded, tile_logits
from tokencredit.errors import TokenCreditError

# Names under which configs keep what happens to logits. A family that uses another name fails the comparison below.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling",)  # Granite; MiniCPM3 divides the hidden states, which is the same
# Gemma 2 and later, RecurrentGemma, xLSTM
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE = 5  # tokens of the row on which heads are compared
TOLERANCE = {torch.float64: 1e-3, torch.float32: 2e-3}  # relative to the largest logit; TF32 is within
COARSE = 0.125  # where the model's own head runs in 16 bits

_checked: WeakKeyDictionary[nn.Module, Readout | str] = WeakKeyDictionary()  # or what is wrong with our logits


def unwrapped(model: nn.Module) -> Any:
    """The model inside data-parallel wrappers."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def causal_of(model: nn.Module) -> Any:
    """The causal language model inside wrappers and PEFT."""
    inner = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def backbone_of(model: nn.Module, whole: bool = False) -> Any:
    """The causal model without its head: hidden states, no logits.

    Vision-language models nest the text decoder: `whole` gives the part around it, which also reads images.
    """
    causal = causal_of(model)
    backbone = getattr(causal, "base_model", causal)
    if backbone is causal:  # `base_model_prefix` names a part that this class does not have, as in Llama 4's text model
        names = ("model", "transformer", "backbone", "language_model")
        parts = [part for part in (getattr(causal, name, None) for name in names) if isinstance(part, nn.Module)]
        backbone = parts[0] if parts else causal
    decoder = getattr(backbone, "language_model", None)
    return decoder if isinstance(decoder, nn.Module) and not whole else backbone


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT (`get_peft_model`), so that its adapter can be switched off.

    `peft_config` is not enough: transformers' own `add_adapter` sets it too, on a model whose `active_adapters` is a
    method and which has no `disable_adapter` context.
    """
    inner = unwrapped(model)
    return hasattr(inner, "peft_config") and hasattr(inner, "get_base_model") and hasattr(inner, "disable_adapter")


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over ranks."""
    return any(is_sharded_parameter(name, parameter) for name, parameter in model.named_parameters())


def is_sharded_parameter(name: str, parameter: Any) -> bool:
    """Whether a parameter is one of DeepSpeed ZeRO-3, FSDP 2 (DTensor) or FSDP 1."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_spec") or "_flat_param" in name


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


def head_of(model: nn.Module, temperature: float = 1.0) -> tuple[Float[Tensor, "vocab hidden"], Readout]:
    """Return the output matrix, and how its logits are read: scale, soft-cap, temperature.

    At the first use of a model the logits rebuilt this way are compared with the model's own on one short row, and a
    model whose head does something else is refused by name. Use it wherever logits are rebuilt from hidden states, so
    that this knowledge has one place:

        weight, readout = head_of(model)
        logits = tile_logits(folded(hidden, readout), weight, readout, None)     # collect.head.tiles

    Raises:
      TokenCreditError: for a head with a bias, one wrapped by an adapter, or one that cannot be rebuilt.
    """
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
    if causal not in _checked:
        readout = readout_of(causal.config.get_text_config())
        _checked[causal] = readout if is_sharded(causal) else _compare(model, causal, head.weight, readout)
    found = _checked[causal]
    if isinstance(found, str):
        raise TokenCreditError(
            f"the logits of {type(causal).__name__} cannot be rebuilt from its hidden states: {found}",
            hint="take log-probs from the host's pass, or a collector of your own; please report the model class",
        )
    return head.weight, found._replace(temperature=temperature)


def readout_of(config: Any) -> Readout:
    """Scale and soft-cap of the logits, as a text model's config names them; not compared with the model."""
    scale = 1.0
    for name in FACTORS:
        scale *= _number(config, name)
    for name in DIVISORS:
        scale /= _number(config, name)
    caps = [float(cap) for cap in (getattr(config, name, None) for name in CAPS) if cap]
    return Readout(1.0, scale, caps[0] if caps else None)


def _number(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else 1.0


@torch.no_grad()
def _compare(model: nn.Module, causal: Any, weight: Tensor, readout: Readout) -> Readout | str:
    """Run one short row; return the readout that gives the model's logits, or what is wrong with ours.

    HyperCLOVA X multiplies by the `logits_scaling` by which Granite divides, so the inverse scale is tried too.
    """
    states: list[Any] = []
    handle = backbone_of(model).register_forward_hook(lambda module, args, output: states.append(output))
    ids = _probe_ids(causal.config, weight.shape[0]).to(weight.device)
    try:
        with eval_mode(causal), torch.autocast(weight.device.type, enabled=False):
            own = causal(input_ids=ids, use_cache=False).logits[0].float()
            if not states:  # some models call a part of their backbone, as OPT does, and compiled ones skip hooks
                states.append(backbone_of(model)(input_ids=ids, use_cache=False))
    finally:
        handle.remove()
    hidden = getattr(states[-1], "last_hidden_state", None)
    if hidden is None:
        return "its parts do not return `last_hidden_state`"
    if hidden.shape[-1] != weight.shape[1]:
        return f"its hidden states have width {hidden.shape[-1]}, its head {weight.shape[1]}"
    # accelerate wraps the forward of a model in autocast, and gives float32 back
    rough = weight.dtype not in TOLERANCE or hasattr(causal, "_original_forward")
    largest = float(own.abs().max())
    allowed = (COARSE if rough else TOLERANCE[weight.dtype]) * max(largest, 1e-6)
    errors = []
    for candidate in (readout, readout._replace(scale=1.0 / readout.scale)):
        with torch.autocast(weight.device.type, enabled=False):
            ours = tile_logits(folded(hidden[0].to(weight.dtype), candidate), weight, candidate, False).float()
        if ours.shape != own.shape:
            return f"it gives logits of shape {tuple(own.shape)}, its head {tuple(ours.shape)}"
        errors.append(float((ours - own).abs().max()))
        if errors[-1] <= allowed:
            return candidate
    return f"they differ from the model's own by up to {errors[0]:.3g}, where the largest is {largest:.3g}"


def _probe_ids(config: Any, vocab: int) -> Tensor:
    """A few ids over the vocabulary, without those that stand for an image or a sound."""
    media = {value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))}
    step = max(1, vocab // (PROBE + 1))
    ids = [number for number in range(min(step, vocab - 1), vocab, step) if number not in media] or [0]
    return torch.tensor([ids[:PROBE]])
