"""A task and a model with the exact credit of its prompts: what one cell of the benchmark measures on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokencredit.bench.config import BenchConfig
from tokencredit.collect.exact.score import in_float64
from tokencredit.collect.exact.spellings import Accepted, encode_accepted
from tokencredit.collect.exact.values import ExactCredit, exact_credit
from tokencredit.collect.prompts import prompt_ids
from tokencredit.errors import TokenCreditError
from tokencredit.pipeline.plugins import load_attribute


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """The prompts of a task and a model on them, with exact credit; `listed` are the accepted texts of each prompt.

    Ids, tries and values are on the CPU, whatever device the model is on.
    """

    task: Any
    problems: Sequence[Any]
    prompts: list[list[int]]
    model: Any
    tokenizer: Any
    credit: ExactCredit
    listed: list[frozenset[str]]

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def padded_prompts(self) -> tuple[Tensor, Tensor]:
        """Ids and mask of the prompts, padded on the left, on the model's device."""
        width, pad = max(map(len, self.prompts)), self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in self.prompts])
        mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in self.prompts])
        return ids.to(self.device), mask.to(self.device)


def load_task(name: str) -> Any:
    """A lab task by name, or `module:attribute`: an object with a task's attributes, or a function that makes one."""
    if ":" not in name:
        from tokencredit.lab.tasks import get_task

        return get_task(name)
    named = load_attribute(name, "the task")
    is_factory = isinstance(named, type) or (not hasattr(named, "problems") and callable(named))
    task = named() if is_factory else named
    for attribute in ("problems", "verify", "accepted", "max_response"):
        if not hasattr(task, attribute):
            raise TokenCreditError(
                f"the task {name!r} has no `{attribute}`",
                hint="a task has problems(split, count, seed), verify(problem, text), accepted(problem), max_response",
            )
    return task


def load_device(name: str) -> torch.device:
    """The device of a config.

    Raises:
      TokenCreditError: it is neither the CPU nor a CUDA device that torch sees.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TokenCreditError(f"unknown device {name!r}", hint="cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise TokenCreditError(f"the benchmark runs on cpu and cuda devices, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise TokenCreditError(
            f"there is no device {name!r}: torch sees {count} CUDA devices", hint="`tokencredit doctor` says why"
        )
    return device


def load_world(config: BenchConfig, task_name: str, stage: str) -> World:
    """Problems, model and exact values of one cell; the stage of a given model is "given"."""
    from tokencredit.lab.data import load_tokenizer

    task, device = load_task(task_name), load_device(config.device)
    folder = _model_folder(config, task_name, stage)
    model, tokenizer = _load_policy(folder), load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise TokenCreditError(f"the tokenizer of {str(folder)!r} has no EOS token", hint="set its `eos_token`")
    model = (in_float64(model) if config.dtype == "float64" else model).to(device)
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


def _model_folder(config: BenchConfig, task_name: str, stage: str) -> str | Path:
    if config.model is not None:
        return config.model
    from tokencredit.lab.model import warm_start

    return warm_start(task_name, stage=stage)


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


def encode_prompt(tokenizer: Any, prompt: Any, chat: bool | str) -> list[int]:
    """Encode one prompt as training does, with at most one BOS at the start.

    Args:
      tokenizer: a Hugging Face tokenizer.
      prompt: a text, or a list of chat messages, which go through the tokenizer's chat template.
      chat: whether a text becomes a user turn of the chat template. "auto": where the tokenizer has a template and the
        text holds none of its special tokens, so that a text with the template applied stays as it is.

    Raises:
      TokenCreditError: the prompt is neither, is empty, cannot be encoded, or needs a chat template that is missing.
    """
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise TokenCreditError(
            f"a problem's `prompt` is a text or a list of messages with role and content, got {prompt!r}"
        )
    if isinstance(prompt, str) and (chat is True or (chat == "auto" and _takes_a_turn(tokenizer, prompt))):
        prompt = [{"role": "user", "content": prompt}]
    ids = prompt_ids(tokenizer, prompt)
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if not ids:
        raise TokenCreditError(f"the prompt {prompt!r} has no tokens", hint="a prompt needs at least one token")
    return ids


def _takes_a_turn(tokenizer: Any, prompt: str) -> bool:
    """Whether there is a chat template that the text was not rendered with already."""
    is_rendered = any(token and token in prompt for token in tokenizer.all_special_tokens)
    return getattr(tokenizer, "chat_template", None) is not None and not is_rendered


def _are_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in prompt)
    )


def encode_listed(tokenizer: Any, responses: Sequence[Any], limit: int | None = None) -> Accepted:
    """Encode accepted responses as `encode_accepted` does: texts in all their spellings, token ids as they are.

    Args:
      tokenizer: a Hugging Face tokenizer.
      responses: texts without EOS, or lists of token ids with or without it.
      limit: the most tokens of a response, EOS included.

    Raises:
      TokenCreditError: a response is neither, is listed twice, or cannot be encoded.
    """
    size = len(tokenizer)
    for response in responses:
        if not isinstance(response, str) and not _are_ids(response, size):
            raise TokenCreditError(
                f"an accepted response is a text or a list of token ids below {size}, got {response!r}"
            )
    try:
        return encode_accepted(tokenizer, responses, max_tokens=limit)
    except TokenCreditError:
        raise
    except Exception as error:  # the tokenizers library raises plain `Exception`
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenCreditError(f"an accepted response cannot be encoded: {reason}") from error


def _are_ids(response: Any, size: int) -> bool:
    return isinstance(response, Sequence) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < size for item in response
    )


def _check_lengths(accepted: Sequence[Sequence[Sequence[int]]], limit: int, tokenizer: Any) -> None:
    for ids in (ids for responses in accepted for ids in responses):
        if len(ids) > limit:
            raise TokenCreditError(
                f"accepted response {tokenizer.decode(ids)!r} has {len(ids)} tokens, EOS included, "
                f"and `max_response` is {limit}",
                hint="raise the task's `max_response`: a response that is cut off is never accepted",
            )
