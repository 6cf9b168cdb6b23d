"""Collectors that run a pass of their own over a `Rollout`, in the host's precision and micro-batches."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.adapter_residual import adapter_residuals, doubling_ratio, reference_logprobs, reference_pass
from tokencredit.collect.attention.answer import answer_importances, answer_mask
from tokencredit.collect.attention.entropies import attention_entropies
from tokencredit.collect.attention.rhythms import attention_rhythms
from tokencredit.collect.rollout import Rollout
from tokencredit.collect.token_texts import batch_token_texts


def adapter_residuals_of(rollout: Rollout, *, layer: Any) -> Float[Tensor, "batch response"]:
    """Two passes of the backbone without logits, in eval mode."""
    return rollout.in_parts(lambda part: adapter_residuals(part.model, part.sequences(), layer=layer)[0])


def doubling_ratios_of(rollout: Rollout, *, layer: Any, rows: int) -> Float[Tensor, " batch"]:
    """Three passes over the first `rows` responses; all responses of this process get the one number."""
    sequences = rollout.sequences()
    with rollout.autocast():
        ratio = doubling_ratio(rollout.model, sequences.rows(slice(rows)), layer)
    return torch.full((len(sequences.input_ids),), ratio, device=sequences.input_ids.device)


def reference_logprobs_of(rollout: Rollout) -> Float[Tensor, "batch response"]:
    """One pass with the adapter off, where the host runs no KL reference: the host's own, as the policy's is."""
    if rollout.score is None:
        return reference_logprobs(rollout.model, rollout.sequences(), rollout.temperature)
    with reference_pass(rollout.model):
        return rollout.score()[0]


def attention_entropies_of(rollout: Rollout, **options: Any) -> Float[Tensor, "batch response"]:
    """One pass up to the layer."""
    return rollout.in_parts(lambda part: attention_entropies(part.model, part.sequences(), **options))


def attention_rhythms_of(rollout: Rollout, **options: Any) -> tuple[Tensor, Tensor]:
    """WAAD and FAI from one pass."""
    return rollout.in_parts(lambda part: attention_rhythms(part.model, part.sequences(), **options))


def importances_of(
    rollout: Rollout, *, after: str | None, tail: int, layer: int | None
) -> Float[Tensor, "batch response"]:
    """How much the answer, by text or by length, attends to the tokens before it.

    Logs the share of responses without the text `after`: their answer is their last tokens.
    """
    if after is not None:
        texts = [rollout.tokenizer.decode(ids) for ids in rollout.responses()]
        missing = sum(after not in text for text in texts)
        rollout.metrics["importances_without_marker"] = missing / max(len(texts), 1)

    return rollout.in_parts(lambda part: _importances(part, after=after, tail=tail, layer=layer))


def _importances(part: Rollout, *, after: str | None, tail: int, layer: int | None) -> Float[Tensor, "batch response"]:
    pieces = None
    if after is not None:
        rows = zip(part.response_ids, part.response_mask, strict=True)
        pieces = batch_token_texts(part.tokenizer, [ids[mask].tolist() for ids, mask in rows])
    answer = answer_mask(part.response_mask, pieces, after, tail)
    return answer_importances(part.model, part.sequences(), answer=answer, layer=layer)
