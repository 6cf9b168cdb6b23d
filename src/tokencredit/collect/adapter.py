"""How far an adapter moves the hidden states: one adapter-disabled pass, shared with the KL reference."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.collect.logprobs import model_inputs, score_states, token_logprobs
from tokencredit.collect.models import backbone_of, check_span, eval_mode, final_norm_of, head_of, layers_of, unwrapped
from tokencredit.errors import TokenCreditError

Layer = Literal["last_postnorm", "last_prenorm", "last_prenorm_relative", "mean_all"]
REFERENCE = "ref"  # the adapter that TRL copies when it is given a model that already has one


@dataclass
class StateTap:
    """Hidden states at the positions that predict the response, pass by pass: with the adapter, and without.

    Each pass is a list of states, one per layer that is measured.
    """

    layer: Layer
    policy: list[list[Tensor]] = field(default_factory=list)
    reference: list[list[Tensor]] = field(default_factory=list)

    def residuals(self) -> Float[Tensor, "batch response"]:
        """The residual of all passes, their rows one after another."""
        if len(self.policy) != len(self.reference) or not self.policy:
            raise TokenCreditError(
                f"a residual needs as many passes with the adapter as without, got {len(self.policy)} and "
                f"{len(self.reference)}",
                hint="tap one scoring pass of the policy and the reference pass over the same rows, nothing else",
            )
        pairs = zip(self.policy, self.reference, strict=True)
        return torch.cat([state_residuals(adapted, base, self.layer) for adapted, base in pairs])


@torch.no_grad()
def adapter_residuals(
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None,
    prompt_length: int,
    response_length: int,
    layer: Layer = "last_postnorm",
    ref_temperature: float | None = None,
    position_ids: Int[Tensor, "batch sequence"] | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"] | None]:
    """(‖h_t^adapted − h_t^base‖₂, log π_ref(y_t | s_t) or None) of each response token, float32.

    h is taken at the position that predicts y_t. Two passes of the backbone in eval mode, no logits; with
    `ref_temperature` the reference's log-probs come from the same second pass. Base is the adapter named "ref" if there
    is one (TRL's copy of the state at the start), else the model with its adapter off.

    * `layer`: "last_postnorm" is the input of the head; "last_prenorm" before the final norm; "last_prenorm_relative"
      over ‖h_base‖; "mean_all" the mean over decoder layers.

    Refused: no LoRA, a merged adapter (the disabled pass would silently unmerge it), LoRA biases (they stay).
    """
    check_adapter(model)
    check_span(prompt_length, response_length, input_ids.shape[1])
    end = prompt_length + response_length
    inputs = model_inputs(input_ids[:, :end], None if attention_mask is None else attention_mask[:, :end], None)
    if position_ids is not None:
        inputs["position_ids"] = position_ids[:, :end]
    targets = input_ids[:, prompt_length:end]
    return _residuals(model, model, reference_pass, inputs, targets, layer, ref_temperature)


@torch.no_grad()
def policy_residuals(
    model: nn.Module,
    reference: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None,
    prompt_length: int,
    response_length: int,
    layer: Layer = "last_postnorm",
    ref_temperature: float | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"] | None]:
    """The same numbers for a model without adapter, against a frozen copy of where it started."""
    check_span(prompt_length, response_length, input_ids.shape[1])
    end = prompt_length + response_length
    inputs = model_inputs(input_ids[:, :end], None if attention_mask is None else attention_mask[:, :end], None)
    targets = input_ids[:, prompt_length:end]
    return _residuals(model, reference, _as_it_is, inputs, targets, layer, ref_temperature)


@torch.no_grad()
def doubling_ratio(
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"],
    prompt_length: int,
    response_length: int,
    layer: Layer = "last_postnorm",
) -> float:
    """Median of residual(2 · scaling) / residual(scaling) over response tokens: 2 for signal, 1 for rounding.

    In bf16 both passes round; below 1.8 the residual orders tokens by rounding, not by the adapter. A residual of 0
    everywhere (B = 0) has nothing to double and gives NaN. Running the same pass twice would not show it: it repeats
    bit for bit.
    """
    check_adapter(model)
    check_span(prompt_length, response_length, input_ids.shape[1])
    end = prompt_length + response_length
    inputs = model_inputs(input_ids[:, :end], attention_mask[:, :end], None)
    rows = slice(-response_length - 1, -1)
    base, adapted, doubled = (
        _states(model, switch, inputs, layer, rows) for switch in (reference_pass, _as_it_is, _doubled)
    )
    once, twice = state_residuals(adapted, base, layer), state_residuals(doubled, base, layer)
    real = attention_mask[:, prompt_length:end].bool() & (once > 0)
    return float((twice[real] / once[real]).median()) if bool(real.any()) else float("nan")


@torch.no_grad()
def pass_states(
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None,
    response_length: int,
    layer: Layer = "last_postnorm",
    reference: bool = True,
) -> list[Float[Tensor, "batch response hidden"]]:
    """One pass of the reference, or of the policy: the states that `capture_states` would have left of it."""
    inputs = model_inputs(input_ids, attention_mask, None)
    return _states(model, reference_pass if reference else _as_it_is, inputs, layer, slice(-response_length - 1, -1))


@torch.no_grad()
def reference_logprobs(
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None,
    prompt_length: int,
    response_length: int,
    temperature: float = 1.0,
) -> Float[Tensor, "batch response"]:
    """log π_ref(y_t | s_t) of a LoRA model, its adapter off: one pass of the backbone, the head in tiles."""
    check_adapter(model)
    with reference_pass(model):
        return token_logprobs(model, input_ids, attention_mask, prompt_length, response_length, temperature)[0]


@contextmanager
def capture_states(model: nn.Module, response_length: int | None, layer: Layer = "last_postnorm") -> Iterator[StateTap]:
    """Inside, every pass of the model leaves its states in the tap: no pass is run for them.

    Put it around a host's scoring pass and its reference pass. Responses are the last `response_length` columns; None
    keeps every column, for hosts that pack sequences.
    """
    check_adapter(model)
    tap = StateTap(layer)

    def keep(states: list[Tensor]) -> None:
        (tap.reference if adapter_is_off(model) else tap.policy).append(states)

    rows = slice(None) if response_length is None else slice(-response_length - 1, -1)
    with _hooks(model, layer, rows, keep):
        yield tap


def state_residuals(adapted: list[Tensor], base: list[Tensor], layer: Layer) -> Float[Tensor, "batch response"]:
    """‖Δh‖₂ in float32, averaged over the layers that were measured; relative to ‖h_base‖ if `layer` says so."""
    norms = [(a.float() - b.float()).norm(dim=-1) for a, b in zip(adapted, base, strict=True)]
    mean = torch.stack(norms).mean(0)
    return mean / base[0].float().norm(dim=-1).clamp_min(1e-30) if layer == "last_prenorm_relative" else mean


def check_adapter(model: nn.Module) -> None:
    """Refuses a model whose adapter cannot be switched off exactly; warns where the residual cannot see all of it."""
    inner = unwrapped(model)
    lora = _lora_modules(model)
    if not hasattr(inner, "peft_config") or not lora:
        raise TokenCreditError(
            f"the adapter residual needs a PEFT LoRA model, got {type(inner).__name__} without LoRA layers",
            hint="train with LoRA, or compare full fine-tuning with a frozen copy: `policy_residuals(model, copy, …)`",
        )
    if any(module.merged for module in lora):
        raise TokenCreditError(
            "the adapter is merged into the weights, and switching it off would silently unmerge it",
            hint="call `model.unmerge_adapter()`, or compare with a frozen copy: `policy_residuals(model, copy, …)`",
        )
    for name in inner.active_adapters:
        config = inner.peft_config[name]
        if getattr(config, "bias", "none") != "none":
            raise TokenCreditError(
                f"the adapter {name!r} trains biases (bias={config.bias!r}), which switching it off does not undo",
                hint="use LoraConfig(bias='none'), or compare with a frozen copy: `policy_residuals(model, copy, …)`",
            )
        if any("lm_head" in module for module in getattr(config, "modules_to_save", None) or ()):
            warnings.warn(
                "the output head is trained (modules_to_save), and the adapter residual cannot see it", stacklevel=3
            )


@contextmanager
def reference_pass(model: nn.Module) -> Iterator[None]:
    """The model as it was when training began: its adapter "ref" if it has one, else no adapter."""
    inner = unwrapped(model)
    if REFERENCE not in inner.peft_config:
        with inner.disable_adapter():
            yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    active = inner.active_adapter
    inner.set_adapter(REFERENCE)  # this also switches requires_grad
    try:
        yield
    finally:
        inner.set_adapter(active)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def adapter_is_off(model: nn.Module) -> bool:
    """Whether a pass now would be the reference's."""
    return any(module.disable_adapters or REFERENCE in module.active_adapters for module in _lora_modules(model))


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    yield


def _residuals(
    model: nn.Module,
    reference: nn.Module,
    switch: Callable[[nn.Module], Any],
    inputs: dict[str, Any],
    targets: Tensor,
    layer: Layer,
    ref_temperature: float | None,
) -> tuple[Tensor, Tensor | None]:
    rows = slice(-targets.shape[1] - 1, -1)
    passes: list[list[Tensor]] = []
    with eval_mode(model), eval_mode(reference):
        with _hooks(model, layer, rows, passes.append):
            backbone_of(model)(**inputs)
        with switch(reference), _hooks(reference, layer, rows, passes.append):
            last = backbone_of(reference)(**inputs).last_hidden_state[:, rows]
            ref_logprobs = None
            if ref_temperature is not None:
                weight, readout = head_of(reference, ref_temperature)
                ref_logprobs, _ = score_states(last, weight, targets, readout)
    adapted, base = passes
    return state_residuals(adapted, base, layer), ref_logprobs


def _states(
    model: nn.Module, switch: Callable[[nn.Module], Any], inputs: dict[str, Any], layer: Layer, rows: slice
) -> list[Tensor]:
    """One pass of the backbone in eval mode, under `switch`."""
    found: list[list[Tensor]] = []
    with eval_mode(model), switch(model), _hooks(model, layer, rows, found.append):
        backbone_of(model)(**inputs)
    return found[0]


@contextmanager
def _hooks(model: nn.Module, layer: Layer, rows: slice, keep: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Calls `keep` once a pass with the states that `layer` names."""
    backbone = backbone_of(model)
    if layer == "last_postnorm":
        handles = [
            backbone.register_forward_hook(lambda m, i, output: keep([output.last_hidden_state[:, rows].detach()]))
        ]
    elif layer == "mean_all":
        states: list[Tensor] = []

        def collect(module: nn.Module, args: Any, output: Any) -> None:
            states.append((output[0] if isinstance(output, tuple) else output)[:, rows].detach())

        def finish(module: nn.Module, args: Any, output: Any) -> None:
            keep(list(states))
            states.clear()

        handles = [block.register_forward_hook(collect) for block in layers_of(backbone)]
        handles.append(backbone.register_forward_hook(finish))
    else:
        norm = final_norm_of(backbone)
        handles = [norm.register_forward_pre_hook(lambda m, args: keep([args[0][:, rows].detach()]))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _doubled(model: nn.Module) -> Iterator[None]:
    """LoRA scaling times two inside."""
    before = [(module, dict(module.scaling)) for module in _lora_modules(model)]
    for module, scaling in before:
        module.scaling = {name: 2.0 * value for name, value in scaling.items()}
    try:
        yield
    finally:
        for module, scaling in before:
            module.scaling = scaling


def _lora_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")]
