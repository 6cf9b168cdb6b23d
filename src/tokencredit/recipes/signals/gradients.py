"""Gradient features of samples for LESS-style influence: LoRA gradients, Adam's view of them, a random projection."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokencredit.collect.models import eval_mode
from tokencredit.errors import TokenCreditError
from tokencredit.progress import track
from tokencredit.recipes.pool.encode import Encoded, encode_all
from tokencredit.seeds import derive

CHUNK = 1 << 16  # parameters projected at once


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Adam's running means of a checkpoint over the trainable parameters, flattened in their order."""

    first: Tensor
    second: Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def update(self, gradient: Tensor) -> Tensor:
        """(β₁m + (1 − β₁)g) / √(β₂v + (1 − β₂)g² + ε): what one Adam step would do; no bias correction, as in LESS."""
        first = self.beta1 * self.first + (1 - self.beta1) * gradient
        second = self.beta2 * self.second + (1 - self.beta2) * gradient**2
        return first / torch.sqrt(second + self.eps)


def gradient_features(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]],
    *,
    width: int = 1024,
    moments: Moments | None = None,
    max_length: int = 1024,
) -> np.ndarray:
    """Projected gradients of the mean response loss over the trainable parameters, rows of length 1, [n, width].

    Train features take `moments`, query features none (LESS, arXiv:2402.04333). One backward pass a sample. With a
    PEFT model the trainable parameters are the adapters. The projection is ±1/√width, drawn from a fixed stream. The
    model is in eval mode inside and afterwards as it was.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TokenCreditError("the model has no trainable parameter", hint="wrap it with a LoRA adapter first")
    rows = np.zeros((len(conversations), width), np.float32)
    with eval_mode(model), torch.enable_grad():
        for row, messages in enumerate(track(conversations, "gradients")):
            (encoded,) = encode_all(tokenizer, [messages], max_length)
            if not encoded.mask[1:].any():
                continue
            gradient = _gradient(model, encoded, parameters)
            vector = gradient if moments is None else moments.update(gradient)
            projected = project_gradient(vector, width).numpy(force=True)
            rows[row] = projected / max(float(np.linalg.norm(projected)), 1e-12)
    return rows


def _gradient(model: Any, encoded: Encoded, parameters: Sequence[Tensor]) -> Tensor:
    """The flat gradient of the mean response loss; 0 for parameters that the sample does not reach."""
    ids = torch.tensor([encoded.ids], device=parameters[0].device)
    labels = torch.where(torch.from_numpy(encoded.mask)[None].to(ids.device), ids, -100)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    parts = torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten().float() for part in parts])


def project_gradient(vector: Tensor, width: int) -> Tensor:
    """Random signs, the same for every sample; the matrix exists one chunk of 65,536 parameters at a time."""
    result = vector.new_zeros(width)
    for number, part in enumerate(vector.split(CHUNK)):
        result += part @ _signs(number, len(part), width).to(part)
    return result / width**0.5


@lru_cache(maxsize=8)
def _signs(number: int, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive("gradient projection", number, width))
    return 2 * torch.randint(0, 2, (rows, width), generator=generator, dtype=torch.int8) - 1
