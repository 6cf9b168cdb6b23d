"""Responses that a model samples to the prompts of a task: verified, scored, with the exact credit of each token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tokencredit.batch.records import TokenBatch
from tokencredit.bench.config import BenchConfig
from tokencredit.bench.problem import World
from tokencredit.collect.exact.score import score_trie
from tokencredit.collect.exact.trie import Trie, build_trie
from tokencredit.collect.exact.values import PrefixCredit
from tokencredit.collect.generate import generate_ids
from tokencredit.seeds import generator


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """One replicate batch: responses on the left of the row, groups complete, their trie, exact credit.

    `respelled` marks responses that say a listed text in tokens that are not listed; they count as wrong, as they do in
    the exact success. `world` lets a collector ask the model for more.
    """

    world: World
    batch: TokenBatch
    trie: Trie
    prefixes: PrefixCredit
    replicate: int
    respelled: Bool[Tensor, " batch"]


def draw(world: World, config: BenchConfig, replicate: int) -> Sampled:
    """Sample one replicate batch, verify it, and look up its exact credit."""
    ids, mask = sample_responses(world, config.rollouts, "bench", config.seed, replicate)
    owners = torch.arange(len(world.prompts)).repeat_interleave(config.rollouts)
    texts = [row[chosen].tolist() for row, chosen in zip(ids, mask, strict=True)]
    pairs = list(zip(owners.tolist(), texts, strict=True))
    respelled = torch.tensor([_is_respelled(world, owner, text) for owner, text in pairs])
    verdicts = [verdict(world, world.problems[owner], text) for owner, text in pairs]
    rewards = torch.where(respelled, 0.0, torch.tensor(verdicts, dtype=torch.float64))
    groups = [texts[row : row + config.rollouts] for row in range(0, len(texts), config.rollouts)]
    trie = build_trie(groups)
    node_logprobs, node_entropies = score_trie(world.model, world.prompts, trie)
    paths = torch.nn.functional.pad(trie.paths, (0, ids.shape[1] + 1 - trie.paths.shape[1]), value=-1)
    logprobs = torch.where(mask, node_logprobs[paths[:, 1:].clamp_min(0)], 0.0)
    entropies = torch.where(mask, node_entropies[paths[:, :-1].clamp_min(0)], 0.0)
    world.credit.check_rewards(owners, ids, mask, rewards)
    prefixes = world.credit.of_responses(owners, ids, mask)
    batch = TokenBatch(
        response_ids=ids,
        response_mask=mask,
        rewards=rewards,
        group_ids=owners,
        old_logprobs=logprobs,
        current_logprobs=logprobs,
        rollout_logprobs=logprobs,
        entropies=entropies,
        values=prefixes.values,
        progress=0.0,
        step=0,
    )
    return Sampled(world=world, batch=batch, trie=trie, prefixes=prefixes, replicate=replicate, respelled=respelled)


def verdict(world: World, problem: Any, ids: list[int]) -> float:
    """1 for a response that ended in EOS and that the verifier accepts."""
    return float(_is_finished(world, ids) and bool(world.task.verify(problem, world.tokenizer.decode(ids[:-1]))))


def _is_finished(world: World, ids: list[int]) -> bool:
    return len(ids) > 0 and ids[-1] == world.tokenizer.eos_token_id


def _is_respelled(world: World, owner: int, ids: list[int]) -> bool:
    """Whether a finished response says a listed text in other tokens than any that is listed."""
    if not _is_finished(world, ids) or world.credit.trie.ends_at_leaf(owner, ids):
        return False
    return world.tokenizer.decode(ids[:-1]) in world.listed[owner]


def sample_responses(world: World, each: int, *stream: str | int) -> tuple[Tensor, Tensor]:
    """Ids and mask of `each` responses to every prompt, at temperature 1, on the CPU; rows of a prompt adjoin."""
    from tokencredit.lab import sampler

    prompt_ids, prompt_mask = world.padded_prompts()
    if sampler.unsupported(world.model) is None:
        drawn = sampler.sample(
            world.model,
            prompt_ids,
            prompt_mask,
            max_new_tokens=world.task.max_response,
            eos_token_id=world.tokenizer.eos_token_id,
            generator=generator(*stream),
            num_return=each,
        )
        return drawn.ids.cpu(), drawn.mask.cpu()
    return _generated(world, each, stream)


def _generated(world: World, each: int, stream: Sequence[str | int]) -> tuple[Tensor, Tensor]:
    """The same through Hugging Face `generate`, which draws from a global generator: it is put back."""
    with seeded(world.device, generator(*stream).initial_seed() % 2**63):
        rows = generate_ids(
            world.model,
            world.prompts,
            max_new_tokens=world.task.max_response,
            ends=[world.tokenizer.eos_token_id],
            samples=each,
        )
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), world.tokenizer.eos_token_id)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = torch.tensor(row)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of `device`; both, and those of no other device, are put back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed every device of the machine
        if devices:
            state = torch.Generator(device=device)
            state.manual_seed(seed)
            torch.cuda.set_rng_state(state.get_state(), device)
        yield
