"""Hidden states of a LoRA model in one pass: which are kept, and how the adapter is switched off or scaled."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokencredit.collect.logprobs import Pass
from tokencredit.collect.models import backbone_of, eval_mode, final_norm_of, is_peft_model, layers_of, unwrapped
from tokencredit.errors import TokenCreditError

Select = Callable[[Tensor], Tensor]  # from the states of a pass to those that predict the response
Layer = Literal["last_postnorm", "last_prenorm", "last_prenorm_relative", "mean_all"]
REFERENCE = "ref"  # the adapter that TRL copies when it is given a model that already has one


def state_residuals(adapted: list[Tensor], base: list[Tensor], layer: Layer) -> Float[Tensor, "batch response"]:
    """‖Δh‖₂ in float32, averaged over the layers that were measured; relative to ‖h_base‖ if `layer` says so."""
    norms = [(a.float() - b.float()).norm(dim=-1) for a, b in zip(adapted, base, strict=True)]
    mean = torch.stack(norms).mean(0)
    return mean / base[0].float().norm(dim=-1).clamp_min(1e-30) if layer == "last_prenorm_relative" else mean


def check_adapter(model: nn.Module) -> None:
    """Refuses a model whose adapter cannot be switched off exactly; warns where the residual cannot see all of it."""
    inner = unwrapped(model)
    lora = lora_modules(model)
    if lora and not is_peft_model(model):
        raise TokenCreditError(
            f"the adapter of this {type(inner).__name__} was added by transformers' `add_adapter`, which cannot switch "
            "it off for one pass",
            hint="wrap the model by `peft.get_peft_model(model, LoraConfig(…))` instead",
        )
    if not lora:
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
    return any(module.disable_adapters or REFERENCE in module.active_adapters for module in lora_modules(model))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model as it is: the switch of a pass with the adapter on."""
    yield


def last_columns(response_length: int | None) -> Select:
    """The states in front of the last `response_length` columns; None keeps all."""
    rows = slice(None) if response_length is None else slice(-response_length - 1, -1)
    return lambda states: states[:, rows]


def columns_before(one: Pass, response_length: int) -> Select:
    """The same for rows whose padding was moved."""
    return lambda states: one.states_before(states, states.shape[1] - response_length, response_length)


def states_of(
    model: nn.Module, switch: Callable[[nn.Module], Any], one: Pass, layer: Layer, select: Select
) -> list[Tensor]:
    """One pass of the backbone in eval mode, under `switch`."""
    states: list[list[Tensor]] = []
    with eval_mode(model), switch(model), state_hooks(model, layer, select, states.append):
        one.run(model)
    return states[0]


@contextmanager
def state_hooks(model: nn.Module, layer: Layer, select: Select, keep: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Calls `keep` once a pass with the states that `layer` names."""
    backbone = backbone_of(model)
    if layer == "last_postnorm":
        handles = [
            backbone.register_forward_hook(lambda m, i, output: keep([select(output.last_hidden_state).detach()]))
        ]
    elif layer == "mean_all":
        states: list[Tensor] = []

        def collect(module: nn.Module, args: Any, output: Any) -> None:
            states.append(select(output[0] if isinstance(output, tuple) else output).detach())

        def finish(module: nn.Module, args: Any, output: Any) -> None:
            keep(list(states))
            states.clear()

        handles = [block.register_forward_hook(collect) for block in layers_of(backbone)]
        handles.append(backbone.register_forward_hook(finish))
    else:
        norm = final_norm_of(backbone)
        handles = [norm.register_forward_pre_hook(lambda m, args: keep([select(args[0]).detach()]))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """LoRA scaling times `factor` inside."""
    before = [(module, dict(module.scaling)) for module in lora_modules(model)]
    for module, scaling in before:
        module.scaling = {name: factor * value for name, value in scaling.items()}
    try:
        yield
    finally:
        for module, scaling in before:
            module.scaling = scaling


def lora_modules(model: nn.Module) -> list[Any]:
    """The layers that carry a LoRA adapter."""
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")]
