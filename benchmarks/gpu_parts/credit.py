"""Section F: `assign_credit` and `credit_metrics` over 16 million tokens that are on the card."""

from typing import Any

import torch
from torch import Tensor

from gpu_parts.measure import Bench, Run, table
from tokencredit import assign_credit, get_pipeline
from tokencredit.batch.records import TokenBatch
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.seeds import generator

METHODS = ("grpo", "hapo", "forking_tokens", "empg", "surprisal", "success_trie", "fipo", "clip_cov")
GROUP, CLIP, ALPHA = 8, 0.5, 0.2


def batch_of(device: torch.device, rows: int, width: int) -> TokenBatch:
    """Random fields on the device, no token left out."""
    entropies = torch.rand(rows, width, device=device) * 2
    logprobs = -torch.rand(rows, width, device=device)
    return TokenBatch(
        response_ids=torch.randint(0, 50, (rows, width), device=device),
        response_mask=torch.ones(rows, width, dtype=torch.bool, device=device),
        rewards=(torch.rand(rows, device=device) < 0.5).float(),
        group_ids=torch.arange(rows, device=device) // GROUP,
        entropies=entropies,
        old_logprobs=logprobs,
        current_logprobs=logprobs - 0.01,
        progress=0.5,
    )


def credit(bench: Bench) -> None:
    """F: every kind of method as shipped, and what a user would write in float32."""
    rows, width = (4096, 4096) if not bench.tiny else (16, 32)
    batch = batch_of(bench.device, rows, width)
    tokens = rows * width
    floor_ms = tokens * 9 / 3.0e12 * 1e3
    bench.say(f"F  {tokens:,} tokens; floor of hapo, 9 bytes per token at 3 TB/s: {floor_ms:.3f} ms")
    for name in METHODS:
        pipeline = get_pipeline(name)
        run = _assigned(pipeline, batch)
        arms: dict[str, Run] = {name: run}
        if name in PLAIN:
            arms[f"{name}, plain float32"] = lambda name=name: PLAIN[name](batch)
        table(bench, "F", bench.time(arms, rounds=3, warm=2), floor_ms)
    advantages = _assigned(get_pipeline("hapo"), batch)()
    host = torch.zeros(rows, device=bench.device)
    table(
        bench,
        "F",
        bench.time({"credit_metrics": lambda: credit_metrics(batch, advantages, host)}, rounds=3, warm=1),
        floor_ms,
    )
    small = batch_of(bench.device, 16, bench.size(4096, 32))
    run = _assigned(get_pipeline("hapo"), small)
    table(bench, "F", bench.time({f"hapo, a micro-batch of {16 * bench.size(4096, 32)} tokens": run}))


def _assigned(pipeline: Any, batch: TokenBatch) -> Run:
    return lambda: assign_credit(pipeline, batch, generator=generator("gpu") if pipeline.draws else None)


def plain_hapo(batch: TokenBatch) -> Tensor:
    """HAPO of groups of eight as a user would write it, in float32."""
    advantages = plain_grpo(batch)
    entropies = batch.entropies.view(-1, GROUP * batch.response_ids.shape[1])
    z = (entropies - entropies.mean(1, keepdim=True)) / (entropies.std(1, correction=0, keepdim=True) + 1e-6)
    bound = advantages.abs() * CLIP
    return advantages + ALPHA * advantages.sign() * z.view(advantages.shape).clamp(-bound, bound)


def plain_grpo(batch: TokenBatch) -> Tensor:
    """GRPO's advantages, one per token."""
    rewards = batch.rewards.view(-1, GROUP)
    scaled = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return scaled.view(-1, 1).expand(batch.response_ids.shape).contiguous()


PLAIN = {"grpo": plain_grpo, "hapo": plain_hapo}
