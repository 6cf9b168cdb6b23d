"""What a cell shows besides the methods: success, where exact credit lies, states, and example responses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokencredit.bench.config import BenchConfig
from tokencredit.bench.entries import Entry
from tokencredit.bench.problem import World
from tokencredit.bench.sampling import Sampled
from tokencredit.collect.token_texts import token_texts
from tokencredit.diagnostics.capacity import information_bounds, quadrant_shares, token_shares
from tokencredit.methods.exact import exact_advantage
from tokencredit.methods.outcome import group_normalized

STATES = 1500  # states in the capacity plot
EXAMPLES = 3  # prompts shown, a success and a failure of each
TOLERANCES = {"float32": 1e-6, "float64": 1e-12}


def summary(world: World, samples: Sequence[Sampled], config: BenchConfig) -> dict[str, Any]:
    """Success, sizes, and the capacity figures of the first replicate batch and of all states of the trie."""
    credit, first = world.credit, samples[0]
    inner = ~credit.trie.is_leaf
    bounds = information_bounds(
        credit.nodes.information[inner],
        credit.nodes.entropies[inner],
        credit.nodes.values[inner],
        tolerance=TOLERANCES[config.dtype],
    )
    batch = first.batch
    groups = batch.rewards.view(-1, config.rollouts).mean(1)
    advantages = group_normalized(batch)
    return {
        "success": {
            "exact": float(credit.prompt_values.mean()),
            "sampled": float(torch.stack([sampled.batch.rewards.mean() for sampled in samples]).mean()),
            "mixed_groups": float(((groups > 0) & (groups < 1)).double().mean()),
            "omitted": float(credit.omitted.mean()) if credit.omitted.numel() else 0.0,
            "other_spellings": float(torch.stack([item.respelled.double().mean() for item in samples]).mean()),
        },
        "sizes": {
            "prompts": len(world.prompts),
            "accepted": len(credit.trie.owners),
            "prefixes": len(credit.trie.children),
            "response_tokens": float(batch.response_mask.sum(1).double().mean()),
            "mean_entropy": float(batch.entropies[batch.response_mask].mean()),  # type: ignore[index]
        },
        "capacity": {
            "bounds": bounds._asdict(),
            "share_of_tokens": token_shares(advantages, batch),
            "share_of_exact_credit": quadrant_shares(exact_advantage(batch), advantages, batch),
            "share_of_information": quadrant_shares(first.prefixes.information, advantages, batch),
        },
        "states": _states(first),
    }


def why_nothing_compares(samples: Sequence[Sampled], rollouts: int) -> str | None:
    """Say why no method has a direction here; None where a group has both a right and a wrong response."""
    rewards = torch.cat([sampled.batch.rewards.view(-1, rollouts) for sampled in samples])
    if bool((rewards.amax(1) != rewards.amin(1)).any()):
        return None
    if not bool(rewards.any()):
        return "no sampled response was right"
    if bool(rewards.all()):
        return "every sampled response was right"
    return "in no group was one response right and another wrong"


def _states(sampled: Sampled) -> dict[str, list[float]]:
    """H, I and V of states that sampled responses pass and from which success is possible, evenly thinned."""
    inside = sampled.batch.response_mask & (sampled.prefixes.nodes >= 0)
    at = inside.nonzero()
    thinned = at[torch.linspace(0, max(len(at) - 1, 0), min(STATES, len(at))).long()].unbind(1)
    entropies = sampled.batch.require("entropies")
    columns = {"H": entropies, "I": sampled.prefixes.information, "V": sampled.prefixes.values}
    return {name: _rounded(values[thinned]) for name, values in columns.items()}


def examples(
    world: World, sampled: Sampled, entries: Sequence[Entry], advantages: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """Responses to the prompts with the most exact credit among those solved now and then: tokens and their credit."""
    batch, exact = sampled.batch, exact_advantage(sampled.batch)
    owners = batch.group_ids.tolist()
    mass: dict[int, float] = {}
    rows: dict[int, dict[float, int]] = {}
    for row, owner in enumerate(owners):
        mass[owner] = mass.get(owner, 0.0) + float(exact[row].abs().sum())
        rows.setdefault(owner, {}).setdefault(float(batch.rewards[row]), row)
    mixed = sorted((owner for owner in rows if len(rows[owner]) == 2), key=mass.__getitem__, reverse=True)
    shown = []
    for owner in mixed[:EXAMPLES]:
        for row in rows[owner].values():
            at = batch.response_mask[row]
            shown.append(
                {
                    "prompt": world.tokenizer.decode(world.prompts[owner]),
                    "reward": float(batch.rewards[row]),
                    "tokens": token_texts(world.tokenizer, batch.response_ids[row][at].tolist()),
                    "entropy": _rounded(batch.require("entropies")[row][at]),
                    "exact": _rounded(exact[row][at]),
                    "methods": {
                        entry.name: _rounded(item[row][at])
                        for entry, item in zip(entries, advantages, strict=True)
                        if not entry.matched
                    },
                }
            )
    return shown


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
