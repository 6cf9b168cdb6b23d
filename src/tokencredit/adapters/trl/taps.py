"""Signals taken from the passes that TRL runs anyway, so that they cost no pass of their own.

Attention entropies come from a pass of the policy: that of the old log-probs, or the forward of the loss. Adapter
residuals need one of those and a pass of the reference: that of the KL, or, without KL, one no-grad pass of our own.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokencredit.collect.adapter_residual import StateTap, capture_states, pass_states, state_residuals
from tokencredit.collect.attention.entropies import tap_entropies
from tokencredit.collect.logprobs import row_slices
from tokencredit.collect.rollout import Sequences


class PassTaps:
    """What the tapped passes of one rollout batch, or of one loss, left behind; `fields` are wanted from them."""

    def __init__(self, fields: Collection[str], options: Mapping[str, Mapping[str, Any]]) -> None:
        self.fields = frozenset(fields)
        self.options = options
        self.layer = options["adapter_residuals"]["layer"]
        self.clear()

    def clear(self) -> None:
        """Forget the passes."""
        self.entropies: list[Tensor] = []
        self.states = StateTap(self.layer)

    @contextmanager
    def around(self, model: nn.Module, response_length: int, *, reference: bool = False) -> Iterator[None]:
        """Tap the passes inside: of the policy, or of the reference (of the same model with its adapter off)."""
        with ExitStack() as stack:
            entropies, states = [], StateTap(self.layer)
            if "attention_entropies" in self.fields and not reference:
                options = self.options["attention_entropies"]
                entropies = stack.enter_context(tap_entropies(model, response_length, **options))
            if "adapter_residuals" in self.fields:
                states = stack.enter_context(capture_states(model, response_length, self.layer))
            yield
        self.entropies += entropies
        self.states.policy += states.policy
        self.states.reference += states.reference

    def read_rollout(
        self, model: nn.Module, sequences: Sequences, rows_per_pass: int
    ) -> dict[str, Float[Tensor, "batch response"]]:
        """The fields that the tapped passes answer; of the two that a residual needs, a missing one is run."""
        fields: dict[str, Tensor] = {}
        if self.entropies:
            fields["attention_entropies"] = torch.cat(self.entropies)
        if self.states.policy:
            if not self.states.reference:
                for rows in row_slices(len(sequences.input_ids), rows_per_pass):
                    self.states.reference.append(pass_states(model, sequences.rows(rows), self.layer))
            fields["adapter_residuals"] = self.states.residuals()
        return fields

    def kept_reference(self) -> Float[Tensor, "batch layer response hidden"] | None:
        """States of the reference pass, one entry a row, to be carried to the loss; None where no pass was tapped."""
        if not self.states.reference:
            return None
        return torch.cat([torch.stack(states, dim=1) for states in self.states.reference])

    def read_loss(
        self,
        model: nn.Module,
        sequences: Sequences,
        reference: Float[Tensor, "batch layer response hidden"] | None,
    ) -> dict[str, Float[Tensor, "batch response"]]:
        """The fields from the forward of the loss; without a carried reference one no-grad pass."""
        fields: dict[str, Tensor] = {}
        if self.entropies:
            fields["attention_entropies"] = self.entropies[-1]
        if self.states.policy:
            base = pass_states(model, sequences, self.layer) if reference is None else list(reference.unbind(1))
            with torch.no_grad():
                fields["adapter_residuals"] = state_residuals(self.states.policy[-1], base, self.layer)
        self.clear()
        return fields


def draws_dropout(model: nn.Module) -> bool:
    """Whether a pass in training mode drops anything: then its states are not those of the sampling policy."""
    rates = (getattr(module, "attention_dropout", 0.0) for module in model.modules())
    dropped = any(isinstance(rate, float) and rate > 0 for rate in rates)
    layers = (module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd))
    return dropped or any(layer.p > 0 for layer in layers)
