"""A task, a model and sampled responses: what one cell of the benchmark measures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from tokencredit.batch.records import TokenBatch
from tokencredit.bench.config import BenchConfig
from tokencredit.bench.texts import encode_listed, encode_prompt
from tokencredit.collect.exact.score import in_float64, score_trie
from tokencredit.collect.exact.trie import Trie, build_trie
from tokencredit.collect.exact.values import ExactCredit, PrefixCredit, exact_credit
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.plugins import load_attribute
from tokencredit.seeds import generator


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """The prompts of a task and a model on them, with exact credit; `listed` are the accepted texts of each prompt."""

    task: Any
    problems: Sequence[Any]
    prompts: list[list[int]]
    model: Any
    tokenizer: Any
    credit: ExactCredit
    listed: list[frozenset[str]]

    def padded_prompts(self) -> tuple[Tensor, Tensor]:
        """Ids and mask of the prompts, padded on the left."""
        width, pad = max(map(len, self.prompts)), self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in self.prompts])
        return ids, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in self.prompts])


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
    if tokenizer.eos_token_id is None:
        raise TokenCreditError(f"the tokenizer of {str(folder)!r} has no EOS token", hint="set its `eos_token`")
    model = in_float64(model) if config.dtype == "float64" else model
    problems = list(task.problems(config.split, config.prompts, config.seed))
    if not problems:
        raise TokenCreditError(f"the task {task_name!r} has no problem in the split {config.split!r}")
    prompts = [encode_prompt(tokenizer, problem.prompt, config.chat) for problem in problems]
    accepted = [encode_listed(tokenizer, task.accepted(problem), task.max_response) for problem in problems]
    _check_lengths(accepted, task.max_response, tokenizer)
    credit = exact_credit(model, prompts, accepted, eos_token_id=tokenizer.eos_token_id, show=tokenizer.decode)
    listed = [frozenset(tokenizer.decode(ids[:-1]) for ids in responses) for responses in accepted]
    return World(
        task=task, problems=problems, prompts=prompts, model=model, tokenizer=tokenizer, credit=credit, listed=listed
    )


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


def _check_lengths(accepted: Sequence[Sequence[Sequence[int]]], limit: int, tokenizer: Any) -> None:
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
    finished = len(ids) > 0 and ids[-1] == world.tokenizer.eos_token_id
    return float(finished and bool(world.task.verify(problem, world.tokenizer.decode(ids[:-1]))))


def _is_respelled(world: World, owner: int, ids: list[int]) -> bool:
    """Whether a finished response says a listed text in other tokens than any that is listed."""
    finished = len(ids) > 0 and ids[-1] == world.tokenizer.eos_token_id
    if not finished or world.credit.trie.ends_at_leaf(owner, ids):
        return False
    return world.tokenizer.decode(ids[:-1]) in world.listed[owner]


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
    """The same through Hugging Face `generate`, which draws from a global generator: it is put back.

    The model's own generation settings, such as a repetition penalty, would change the distribution and are set aside.
    """
    from transformers import GenerationConfig

    device, eos = world.model.device, world.tokenizer.eos_token_id
    kept = world.model.generation_config
    world.model.generation_config = GenerationConfig()
    try:
        with seeded(device, generator(*stream).initial_seed() % 2**63):
            output = world.model.generate(
                input_ids=prompt_ids.to(device),
                attention_mask=prompt_mask.long().to(device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=world.task.max_response,
                num_return_sequences=each,
                eos_token_id=eos,
                pad_token_id=eos,
            )
    finally:
        world.model.generation_config = kept
    ids = output[:, prompt_ids.shape[1] :].cpu()
    ended = (ids == eos).long().cumsum(1)
    return ids, (ended == 0) | ((ids == eos) & (ended == 1))


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
