"""Local teachers: another checkpoint, or the policy itself with other weights or another prompt."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.models import is_peft_model, is_sharded_parameter, unwrapped
from tokencredit.collect.rollout import takes
from tokencredit.collect.teacher.base import BaseTeacher, TeacherRequest
from tokencredit.collect.teacher.checks import check_chat, check_end, check_size, check_tokenizers, end_ids
from tokencredit.collect.teacher.probe import StartProbe
from tokencredit.collect.teacher.prompts import Row, check_fits
from tokencredit.collect.teacher.score import Scores, score_entropies, used_widths
from tokencredit.errors import TokenCreditError


class _Scoring(BaseTeacher):
    """Scores of a model that is at hand."""

    _start: StartProbe | None = None  # a teacher that is the policy itself has nothing to show

    @abstractmethod
    def _weights(self, policy: Any, device: torch.device) -> AbstractContextManager[Any]:
        """The model that scores, with the weights that it scores with, inside."""

    @takes(TeacherRequest, after=1, positional=6)
    def score(self, request: TeacherRequest) -> Float[Tensor, "batch response"]:
        """ln π_T of the chosen tokens in nats, float32, 0 elsewhere."""
        return self.score_with_entropies(request)[0]

    @takes(TeacherRequest, after=1, positional=6)
    def score_with_entropies(self, request: TeacherRequest) -> Scores:
        """The same with the entropy of the teacher in front of each chosen token, from the same pass."""
        ids, mask = request.response_ids, request.response_mask
        with self.opened(request.prompt_ids, mask, request.rows, request.policy) as (model, prompts):
            device = next(model.parameters()).device
            options = {"temperature": request.temperature, "batch_size": self.given["batch_size"], "device": device}
            scores = score_entropies(model, prompts, ids, mask, **options)
        if self._start is not None:
            self._start(self.score, scores[0], request, self._student)
        return scores

    @contextmanager
    def opened(
        self, prompt_ids: list[list[int]], response_mask: Tensor, rows: Sequence[Row], policy: Any = None
    ) -> Iterator[tuple[Any, list[list[int]]]]:
        """The model that scores and the prompts that it sees, for callers that need more than `score` gives."""
        with self._weights(policy, response_mask.device) as model:
            yield model, self._prompts(prompt_ids, response_mask, rows, model)

    def _prompts(
        self, prompt_ids: list[list[int]], response_mask: Tensor, rows: Sequence[Row], model: Any
    ) -> list[list[int]]:
        if self.prompts.text is not None and self._student is None:
            raise TokenCreditError(
                "a teacher with a template must be checked first", hint="call `check(policy_tokenizer)`"
            )
        prompts = self.prompts.prompts(rows, prompt_ids, self._student)
        limit = self.prompts.max_length or getattr(unwrapped(model).config, "max_position_embeddings", None)
        check_fits(prompts, used_widths(response_mask), limit)
        return prompts


class ModelTeacher(_Scoring):
    """Another checkpoint with the student's tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, given: Mapping[str, Any]) -> None:
        super().__init__(given)
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self._start = StartProbe()

    @classmethod
    def load(cls, given: Mapping[str, Any]) -> "ModelTeacher":
        """From a folder or a hub name; `trust_remote_code` is off unless asked for."""
        from tokencredit.collect.load import load_model, load_tokenizer

        shared = {"revision": given["revision"], "trust_remote_code": given["trust_remote_code"]}
        try:
            tokenizer = load_tokenizer(given["tokenizer"] or given["model"], **shared)
            model: Any = load_model(given["model"], dtype=given["dtype"], **_quantized(given), **shared)
        except (TokenCreditError, ImportError) as error:
            raise TokenCreditError(
                f"cannot load the teacher {given['model']!r}: {error}", hint="give a folder or a name of the hub"
            ) from error
        if given["device"] is not None and given["quantization"] == "none":
            model = model.to(given["device"])
        return cls(model, tokenizer, given)

    def _check_student(self, tokenizer: Any, policy: Any, rows: Sequence[Row]) -> None:
        """Refuse another vocabulary, another chat template, another EOS."""
        check_tokenizers(tokenizer, self.tokenizer)
        check_size(tokenizer, self.model.get_input_embeddings().weight.shape[0])
        ends = end_ids(tokenizer, policy), end_ids(self.tokenizer, self.model)
        check_end(*ends, tokenizer, self.given["eos"])
        kwargs = self.given["chat_template_kwargs"]
        check_chat(tokenizer, self.tokenizer, rows, kwargs, self.given["chat_template"])

    @contextmanager
    def _weights(self, policy: Any, device: torch.device) -> Iterator[Any]:
        """The checkpoint, moved at the first call to where the policy is, unless it has a place of its own."""
        own = next(self.model.parameters()).device
        if self.given["device"] is None and self.given["quantization"] == "none" and own != device:
            self.model = self.model.to(device)
        yield self.model


class SelfTeacher(_Scoring):
    """The policy as its own teacher: under a privileged prompt, with other weights, or both.

    * live: the weights that sampled. * frozen: a copy of the trainable parameters as they were at the first call.
    * ema: their moving average, θ̄ ← θ̄ + rate (θ − θ̄) after each optimizer step. * base: the LoRA adapter switched off.

    "frozen" and "ema" hold a second copy of the *trainable* parameters, which is small under LoRA; "base" holds none.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(given)
        self._copy: dict[str, Tensor] = {}

    def _check_student(self, tokenizer: Any, policy: Any, rows: Sequence[Row]) -> None:
        """Refuse "base" without an adapter, and copies of sharded parameters."""
        if policy is not None:
            self._check_policy(policy)

    @contextmanager
    def _weights(self, policy: Any, device: torch.device) -> Iterator[Any]:
        """The policy with the teacher's weights."""
        if policy is None:
            raise TokenCreditError("a self teacher scores with the policy, got none", hint="pass `policy=model`")
        self._check_policy(policy)
        self._remember(policy)
        with self._swapped_weights(policy):
            yield policy

    def after_step(self, policy: Any) -> None:
        """Move the average; nothing for the other weights."""
        if self.given["weights"] != "ema":
            return
        self._remember(policy)
        with torch.no_grad():
            for name, parameter in _trainable(policy).items():
                self._copy[name].lerp_(parameter.detach().to(self._copy[name].dtype), self.given["ema_rate"])

    def state(self) -> dict[str, Tensor]:
        """The copy of the parameters, so that a resumed run has the same teacher."""
        return {name: value.detach().cpu().clone() for name, value in self._copy.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._copy = {name: value.clone() for name, value in state.items()}

    def _check_policy(self, policy: Any) -> None:
        if self.given["weights"] == "base" and not is_peft_model(policy):
            raise TokenCreditError(
                f"a base teacher is the policy with its LoRA adapter off, and {type(policy).__name__} has no adapter",
                hint="train with `peft_config`, or use `kind: self` with `weights: frozen`",
            )
        sharded = next((name for name, p in policy.named_parameters() if is_sharded_parameter(name, p)), None)
        if self.given["weights"] in ("frozen", "ema") and sharded is not None:
            raise TokenCreditError(
                f"{self.given['weights']} weights need whole parameters on each rank, and {sharded!r} is sharded",
                hint="use `weights: live` or `base`, or a frozen copy as `kind: model`",
            )

    def _remember(self, policy: Any) -> None:
        """Copy the trainable parameters at the first call. The average is float32: its steps are below bf16."""
        if self.given["weights"] not in ("frozen", "ema"):
            return
        current = _trainable(policy)
        if not self._copy:
            wide = torch.float32 if self.given["weights"] == "ema" else None
            self._copy = {name: p.detach().to(dtype=wide or p.dtype, copy=True) for name, p in current.items()}
        if self._copy.keys() != current.keys():
            raise TokenCreditError(
                f"the teacher holds {len(self._copy)} parameters of another policy, this one trains {len(current)}"
            )
        for name, parameter in current.items():
            self._copy[name] = self._copy[name].to(parameter.device)

    def _swapped_weights(self, policy: Any) -> Any:
        if self.given["weights"] == "base":
            return unwrapped(policy).disable_adapter()
        return _swapped(_trainable(policy), self._copy) if self._copy else nullcontext()


@contextmanager
def _swapped(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters hold `values` inside; their own storage comes back untouched.

    A host's autocast keeps 16-bit copies of parameters, by object and not by value: they are dropped on both sides.
    """
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter.dtype)
        torch.clear_autocast_cache()
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
        torch.clear_autocast_cache()


def _trainable(policy: Any) -> dict[str, Any]:
    return {name: p for name, p in unwrapped(policy).named_parameters() if p.requires_grad}


def _quantized(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["quantization"] == "none":
        return {}
    from transformers import BitsAndBytesConfig

    bits: dict[str, dict[str, Any]] = {
        "8bit": {"load_in_8bit": True},
        "4bit": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    }
    config = BitsAndBytesConfig(**bits[given["quantization"]])
    return {"quantization_config": config, "device_map": {"": given["device"] or 0}}
