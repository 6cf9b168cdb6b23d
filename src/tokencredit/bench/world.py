"""A task, a model and sampled responses: what one cell of the benchmark measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencredit.bench.config import BenchConfig
from tokencredit.collect.exact import ExactCredit, PrefixCredit, encode_accepted, exact_credit
from tokencredit.collect.exact_score import in_float64, score_trie
from tokencredit.collect.exact_trie import Trie, build_trie
from tokencredit.errors import TokenCreditError
from tokencredit.loading import load_attribute
from tokencredit.records import TokenBatch
from tokencredit.seeds import generator


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """The prompts of a task and a model on them, with exact credit."""

    task: Any
    problems: Sequence[Any]
    prompts: list[list[int]]
    model: Any
    tokenizer: Any
    credit: ExactCredit

    def padded_prompts(self) -> tuple[Tensor, Tensor]:
        """Ids and mask of the prompts, padded on the left."""
        width, pad = max(map(len, self.prompts)), self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in self.prompts])
        return ids, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in self.prompts])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """One replicate batch: responses on the left of the row, groups complete, their trie, exact credit.

    `world` lets a collector ask the model for more.
    """

    world: World
    batch: TokenBatch
    trie: Trie
    prefixes: PrefixCredit
    replicate: int


def load_task(name: str) -> Any:
    """A lab task by name, or `module:attribute`: an object with a task's attributes, or a function that makes one."""
    if ":" not in name:
        from tokencredit.lab.tasks import get_task

        return get_task(name)
    found = load_attribute(name, "the task")
    task = found() if isinstance(found, type) or (not hasattr(found, "problems") and callable(found)) else found
    for needed in ("problems", "verify", "accepted", "max_response"):
        if not hasattr(task, needed):
            raise TokenCreditError(
                f"the task {name!r} has no `{needed}`",
                hint="a task has problems(split, count, seed), verify(problem, text), accepted(problem), max_response",
            )
    return task


def load_world(config: BenchConfig, task_name: str, stage: str) -> World:
    """Problems, model and exact values of one cell; the stage of a given model is "given"."""
    from tokencredit.lab.data import load_tokenizer

    task = load_task(task_name)
    folder: str | Path
    if config.model is not None:
        folder = config.model
    else:
        from tokencredit.lab.model import warm_start

        folder = warm_start(task_name, stage=stage)
    model, tokenizer = _load_policy(folder), load_tokenizer(folder)
    model = in_float64(model) if config.dtype == "float64" else model
    problems = task.problems(config.split, config.prompts, config.seed)
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    limit = task.max_response
    accepted: list[list[list[int]]] = [encode_accepted(tokenizer, task.accepted(p), max_tokens=limit) for p in problems]
    _check_lengths(accepted, task.max_response, tokenizer)
    credit = exact_credit(model, prompts, accepted, eos_token_id=tokenizer.eos_token_id, show=tokenizer.decode)
    return World(task=task, problems=problems, prompts=prompts, model=model, tokenizer=tokenizer, credit=credit)


def _load_policy(folder: str | Path) -> Any:
    """A model in eval mode; of a PEFT folder the base with its adapter, whose parameters alone are then trained."""
    from tokencredit.lab.data import load_model

    if not (Path(folder) / "adapter_config.json").is_file():
        return load_model(folder).eval()
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise TokenCreditError(
            f"the adapter in {str(folder)!r} does not say which model it belongs to",
            hint="write its folder as `base_model_name_or_path` in adapter_config.json",
        )
    return PeftModel.from_pretrained(load_model(base), str(folder), is_trainable=True).eval()


def _check_lengths(accepted: list[list[list[int]]], limit: int, tokenizer: Any) -> None:
    for responses in accepted:
        for ids in responses:
            if len(ids) > limit:
                raise TokenCreditError(
                    f"accepted response {tokenizer.decode(ids)!r} has {len(ids)} tokens, EOS included, "
                    f"and `max_response` is {limit}",
                    hint="raise the task's `max_response`: a response that is cut off is never accepted",
                )


def draw(world: World, config: BenchConfig, replicate: int) -> Sampled:
    """Sample one replicate batch, verify it, and look up its exact credit."""
    ids, mask = sample_responses(world, config.rollouts, "bench", config.seed, replicate)
    owners = torch.arange(len(world.prompts)).repeat_interleave(config.rollouts)
    texts = [row[chosen].tolist() for row, chosen in zip(ids, mask, strict=True)]
    rewards = torch.tensor(
        [verdict(world, world.problems[owner], text) for owner, text in zip(owners.tolist(), texts, strict=True)],
        dtype=torch.float64,
    )
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
    return Sampled(world=world, batch=batch, trie=trie, prefixes=prefixes, replicate=replicate)


def verdict(world: World, problem: Any, ids: list[int]) -> float:
    """1 for a response that ended in EOS and that the verifier accepts."""
    finished = len(ids) > 0 and ids[-1] == world.tokenizer.eos_token_id
    return float(finished and bool(world.task.verify(problem, world.tokenizer.decode(ids[:-1]))))


def sample_responses(world: World, each: int, *stream: str | int) -> tuple[Tensor, Tensor]:
    """Ids and mask of `each` responses to every prompt, at temperature 1; rows of a prompt are neighbours."""
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
        return drawn.ids, drawn.mask
    return _generated(world, prompt_ids, prompt_mask, each, stream)


def _generated(
    world: World, prompt_ids: Tensor, prompt_mask: Tensor, each: int, stream: Sequence[str | int]
) -> tuple[Tensor, Tensor]:
    """The same through Hugging Face `generate`, which draws from torch's global generator: it is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*stream).initial_seed() % 2**63)
        output = world.model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask.long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=world.task.max_response,
            num_return_sequences=each,
            eos_token_id=world.tokenizer.eos_token_id,
            pad_token_id=world.tokenizer.eos_token_id,
        )
    ids = output[:, prompt_ids.shape[1] :]
    ended = (ids == world.tokenizer.eos_token_id).long().cumsum(1)
    first = (ids == world.tokenizer.eos_token_id) & (ended == 1)
    return ids, (ended == 0) | first
