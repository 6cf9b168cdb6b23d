"""How far an adapter moves the hidden states: one adapter-disabled pass, shared with the KL reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokencredit.collect.adapter_states import (
    Layer,
    Select,
    adapter_is_off,
    check_adapter,
    columns_before,
    last_columns,
    reference_pass,
    scaled,
    state_hooks,
    state_residuals,
    states_of,
    unchanged,
)
from tokencredit.collect.logprobs import Pass, check_media, model_inputs, pass_of, score_states, token_logprobs
from tokencredit.collect.models import eval_mode, head_of
from tokencredit.collect.rollout import Sequences, takes
from tokencredit.errors import TokenCreditError

LINEAR, HALVINGS = 1.9, 8  # a ratio that shows signal; how often the scaling is halved in search of one


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


@takes(Sequences, after=1)
@torch.no_grad()
def adapter_residuals(
    model: nn.Module, sequences: Sequences, layer: Layer = "last_postnorm", ref_temperature: float | None = None
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
    return _residuals(model, (model, reference_pass), sequences, layer, ref_temperature)


@takes(Sequences, after=2)
@torch.no_grad()
def policy_residuals(
    model: nn.Module,
    reference: nn.Module,
    sequences: Sequences,
    layer: Layer = "last_postnorm",
    ref_temperature: float | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"] | None]:
    """The same numbers for a model without adapter, against a frozen copy of where it started."""
    return _residuals(model, (reference, unchanged), sequences, layer, ref_temperature)


@takes(Sequences, after=1)
@torch.no_grad()
def doubling_ratio(model: nn.Module, sequences: Sequences, layer: Layer = "last_postnorm") -> float:
    """Return 2 where the residual is signal, 1 where it is rounding: how it grows when the LoRA scaling is doubled.

        max over k of the median over tokens of residual(2ᵏ · scaling) / residual(2ᵏ⁻¹ · scaling),   k = 1, 0, −1, …

    In bf16 both passes round; below 1.8 the residual orders tokens by rounding, not by the adapter. A strong adapter
    saturates: doubling it does not double the residual (1.4 was seen in float32). Therefore the scaling is halved, up
    to eight times, until the ratio is 1.9: signal doubles at a smaller scaling, and rounding never does. Three passes
    where the first ratio is at least 1.9, one more for each halving.

    A residual of 0 everywhere (B = 0) has nothing to double and gives NaN. Running the same pass twice would not show
    rounding: it repeats bit for bit.
    """
    check_adapter(model)
    check_media(model, sequences)
    one, select = _tapped_pass(sequences)
    base, adapted = (states_of(model, switch, one, layer, select) for switch in (reference_pass, unchanged))
    mask = torch.ones_like(sequences.input_ids) if sequences.attention_mask is None else sequences.attention_mask
    real = mask[:, sequences.response_columns].bool()

    def residuals(power: int) -> Tensor:
        stretched = states_of(model, lambda inner: scaled(inner, 2.0**power), one, layer, select)
        return state_residuals(stretched, base, layer)

    smaller = state_residuals(adapted, base, layer)
    best = _median_ratio(residuals(1), smaller, real)
    for power in range(-1, -1 - HALVINGS, -1):
        if best != best or best >= LINEAR:
            break
        larger, smaller = smaller, residuals(power)
        best = max(best, min(_median_ratio(larger, smaller, real), 2.0))  # steeper than linear is signal too
    return best


@torch.no_grad()
def pass_states(
    model: nn.Module, sequences: Sequences, layer: Layer = "last_postnorm", reference: bool = True
) -> list[Float[Tensor, "batch response hidden"]]:
    """One pass of the reference, or of the policy: the states that `capture_states` would have left of it.

    The rows stay in the host's layout, as in the host's own passes, from which these states are subtracted.
    """
    check_media(model, sequences)
    switch = reference_pass if reference else unchanged
    select = last_columns(sequences.response_length)
    return states_of(model, switch, Pass(model_inputs(sequences), None), layer, select)


class PolicyScores(NamedTuple):
    """Scores of the policy and of its reference from one path; their difference is that of the models alone."""

    logprobs: Float[Tensor, "batch response"]
    entropies: Float[Tensor, "batch response"]
    ref_logprobs: Float[Tensor, "batch response"]


@takes(Sequences, after=1)
def policy_and_reference(
    model: nn.Module, sequences: Sequences, temperature: float = 1.0, *, rows_per_pass: int | None = None
) -> PolicyScores:
    """Score responses under a LoRA policy and under its reference, in the same batches, kernels and precision.

    Two passes of the backbone in eval mode, the heads in tiles and float32. While B = 0 the two log-probs are equal bit
    for bit, also under autocast. A log-prob from a host's kernel minus one from ours is not: in bf16 the difference is
    about 0.03 nats per token, as large as a true log-ratio early in training.
    """
    check_adapter(model)
    logprobs, entropies = token_logprobs(model, sequences, temperature, rows_per_pass)
    return PolicyScores(logprobs, entropies, reference_logprobs(model, sequences, temperature, rows_per_pass))


@takes(Sequences, after=1)
def reference_logprobs(
    model: nn.Module, sequences: Sequences, temperature: float = 1.0, rows_per_pass: int | None = None
) -> Float[Tensor, "batch response"]:
    """log π_ref(y_t | s_t) of a LoRA model, its adapter off: one pass of the backbone, the head in tiles.

    To subtract it from the policy's log-probs take both from `policy_and_reference`.
    """
    check_adapter(model)
    with reference_pass(model):
        return token_logprobs(model, sequences, temperature, rows_per_pass)[0]


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

    with state_hooks(model, layer, last_columns(response_length), keep):
        yield tap


def _residuals(
    model: nn.Module,
    base: tuple[nn.Module, Callable[[nn.Module], Any]],
    sequences: Sequences,
    layer: Layer,
    ref_temperature: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Residuals against `base`: a model, and the switch under which it is the reference."""
    check_media(model, sequences)
    reference, switch = base
    one, select = _tapped_pass(sequences)
    head = None if ref_temperature is None else head_of(reference, ref_temperature)
    ref_logprobs = None
    states: list[list[Tensor]] = []
    with eval_mode(model), eval_mode(reference):
        with state_hooks(model, layer, select, states.append):
            one.run(model)
        with switch(reference), state_hooks(reference, layer, select, states.append):
            last = select(one.run(reference).last_hidden_state)
            if head is not None:
                ref_logprobs = score_states(last, head[0], sequences.response_ids, head[1])[0]
    return state_residuals(states[0], states[1], layer), ref_logprobs


def _tapped_pass(sequences: Sequences) -> tuple[Pass, Select]:
    """A pass up to the last response token, padding on the right, and the states of it that predict the response."""
    one = pass_of(sequences.without_tail())
    return one, columns_before(one, sequences.response_length)


def _median_ratio(larger: Tensor, smaller: Tensor, real: Tensor) -> float:
    """Median growth over real tokens with a residual; NaN where there is none."""
    counted = real & (smaller > 0)
    return float((larger[counted] / smaller[counted]).median()) if bool(counted.any()) else float("nan")
