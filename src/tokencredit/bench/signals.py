"""Batch fields that the benchmark measures on its model: attention, and how an adapter moves the hidden states."""

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.bench.problem import World
from tokencredit.bench.sampling import Sampled, sample_responses, seeded, verdict
from tokencredit.collect.adapter_residual import adapter_residuals, doubling_ratio, reference_logprobs
from tokencredit.collect.attention.answer import answer_importances, answer_mask
from tokencredit.collect.attention.entropies import attention_entropies
from tokencredit.collect.attention.rhythms import attention_rhythms
from tokencredit.seeds import derive

RANK, STEP = 16, 3e-4  # of the adapter that a model without one is given, and the first step of Adam that it takes
EACH = 16  # responses to a prompt that this step is taken from
TAIL = 4  # tokens of the answer, for `importances`
TILE = 128  # rows of one backward
PROBES = 16  # responses that the doubling ratio is measured on

Span = tuple[Tensor, Tensor, int, int]


def span_of(world: World, response_ids: Tensor, response_mask: Tensor) -> Span:
    """Prompts and responses as one sequence on the model's device, its mask, and the lengths of the parts."""
    ids, mask = world.padded_prompts()
    each = len(response_ids) // len(ids)
    whole = torch.cat((ids.repeat_interleave(each, 0), response_ids.to(ids.device)), dim=1)
    seen = torch.cat((mask.repeat_interleave(each, 0), response_mask.to(ids.device)), dim=1)
    return whole, seen, ids.shape[1], response_ids.shape[1]


def _span(sampled: Sampled) -> Span:
    return span_of(sampled.world, sampled.batch.response_ids, sampled.batch.response_mask)


def entropies(sampled: Sampled) -> Float[Tensor, "batch response"]:
    """Entropy of the attention at the middle layer, from one pass up to it."""
    return attention_entropies(sampled.world.model, *_span(sampled)).cpu()


def distances(sampled: Sampled) -> Float[Tensor, "batch response"]:
    """How far local heads look back."""
    return _rhythms(sampled)[0].cpu()


def influences(sampled: Sampled) -> Float[Tensor, "batch response"]:
    """How much later tokens look back at a token."""
    return _rhythms(sampled)[1].cpu()


@lru_cache(maxsize=1)
def _rhythms(sampled: Sampled) -> tuple[Tensor, Tensor]:
    return attention_rhythms(sampled.world.model, *_span(sampled))


def importances(sampled: Sampled) -> Float[Tensor, "batch response"]:
    """Attention that the last tokens of a response pay to those before, in the last layer."""
    answer = answer_mask(sampled.batch.response_mask, None, None, TAIL).to(sampled.world.device)
    return answer_importances(sampled.world.model, *_span(sampled), answer=answer).cpu()


def residuals(sampled: Sampled) -> Float[Tensor, "batch response"]:
    """The adapter residual of the model's own adapter, or of a fresh one after one step (`adapted`)."""
    return adapter_residuals(adapted(sampled.world), *_span(sampled))[0].cpu()


def doubling(sampled: Sampled) -> Float[Tensor, " batch"]:
    """The doubling ratio of the same adapter, from the first responses."""
    ids, mask, prompt, response = _span(sampled)
    ratio = doubling_ratio(adapted(sampled.world), ids[:PROBES], mask[:PROBES], prompt, response)
    return torch.full((len(ids),), ratio)


def reference(sampled: Sampled) -> Float[Tensor, "batch response"]:
    """Log-probs of the reference: the adapter off, or, where the policy has none, the fresh adapter on.

    Either way |log π − log π_ref| is the divergence between the model with and without the adapter.
    """
    world = sampled.world
    if hasattr(world.model, "peft_config"):
        return reference_logprobs(world.model, *_span(sampled)).cpu()
    from tokencredit.collect.logprobs import token_logprobs

    return token_logprobs(adapted(world), *_span(sampled))[0].cpu()


@lru_cache(maxsize=1)
def adapted(world: World) -> Any:
    """The model of the world if it has an adapter; else a copy with a fresh LoRA after one policy-gradient step.

    A is peft's random start from a stream of its own, B = STEP · sign ∂J/∂B at B = 0: the first step of Adam, on
    responses that are sampled for it alone. A residual at B = 0 is 0 everywhere and orders nothing.
    """
    if hasattr(world.model, "peft_config"):
        return world.model
    from peft import LoraConfig, get_peft_model

    with seeded(world.device, derive("bench adapter")):
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        model = get_peft_model(copy.deepcopy(world.model), config).eval()
    parameters = [value for name, value in model.named_parameters() if "lora_B" in name]
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for objective in _objectives(world, model):
        for total, gradient in zip(gradients, torch.autograd.grad(objective, parameters), strict=True):
            total += gradient
    with torch.no_grad():
        for parameter, total in zip(parameters, gradients, strict=True):
            parameter.copy_(STEP * total.sign())
    return model


def _objectives(world: World, model: Any) -> Iterator[Tensor]:
    """Σ A ln π(y) over group-centred outcomes of fresh responses, tile by tile."""
    ids, mask = sample_responses(world, EACH, "bench adapter")
    owners = [problem for problem in world.problems for _ in range(EACH)]
    texts = [row[chosen].tolist() for row, chosen in zip(ids, mask, strict=True)]
    rewards = torch.tensor([verdict(world, owner, text) for owner, text in zip(owners, texts, strict=True)])
    groups = rewards.view(-1, EACH)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    whole, seen, prompt, response = span_of(world, ids, mask)
    ids, mask = ids.to(whole.device), mask.to(whole.device)
    for rows in torch.arange(len(whole)).split(TILE):
        logits = model(input_ids=whole[rows], attention_mask=seen[rows]).logits[:, prompt - 1 : prompt - 1 + response]
        logprobs = torch.log_softmax(logits, -1).gather(2, ids[rows][..., None])[..., 0]
        yield (torch.where(mask[rows], logprobs, 0.0).sum(1) * advantages[rows].to(logprobs)).sum()
