"""Local teachers: another checkpoint, or the policy itself with other weights or another prompt."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.collect.models import is_peft_model, unwrapped
from tokencredit.collect.teacher.checks import check_chat, check_end, check_size, check_tokenizers, end_ids
from tokencredit.collect.teacher.probe import Batch, StartProbe
from tokencredit.collect.teacher.prompts import PromptRenderer, check_fits, first_rows
from tokencredit.collect.teacher.score import Scores, score_entropies, used_widths
from tokencredit.errors import TokenCreditError


class _Scoring(ABC):
    """Scores of a model that is at hand: `opened` gives it with the prompts that it sees."""

    given: Mapping[str, Any]
    _student: Any = None  # the student's tokenizer
    _start: StartProbe | None = None  # a teacher that is the policy itself has nothing to show

    @abstractmethod
    def opened(
        self,
        prompt_ids: list[list[int]],
        response_mask: Bool[Tensor, "batch response"],
        rows: list[Mapping[str, Any]],
        policy: Any = None,
    ) -> AbstractContextManager[tuple[Any, list[list[int]]]]:
        """The teacher's model and its prompts, in token ids, for as long as it scores."""

    def score(
        self,
        prompt_ids: list[list[int]],
        response_ids: Int[Tensor, "batch response"],
        response_mask: Bool[Tensor, "batch response"],
        rows: list[Mapping[str, Any]],
        temperature: float,
        policy: Any = None,
    ) -> Float[Tensor, "batch response"]:
        """ln π_T of the chosen tokens in nats, float32, 0 elsewhere."""
        return self.score_with_entropies(prompt_ids, response_ids, response_mask, rows, temperature, policy)[0]

    def score_with_entropies(
        self,
        prompt_ids: list[list[int]],
        response_ids: Int[Tensor, "batch response"],
        response_mask: Bool[Tensor, "batch response"],
        rows: list[Mapping[str, Any]],
        temperature: float,
        policy: Any = None,
    ) -> Scores:
        """The same with the entropy of the teacher in front of each chosen token, from the same pass."""
        with self.opened(prompt_ids, response_mask, rows, policy) as (model, prompts):
            scores = score_entropies(
                model,
                prompts,
                response_ids,
                response_mask,
                temperature=temperature,
                batch_size=self.given["batch_size"],
                device=next(model.parameters()).device,
            )
        if self._start is not None:
            batch = Batch(prompt_ids, response_ids, response_mask, rows)
            self._start(self.score, scores[0], batch, temperature, policy, self._student)
        return scores


class ModelTeacher(_Scoring):
    """Another checkpoint with the student's tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, given: Mapping[str, Any]) -> None:
        self.model, self.tokenizer, self.given = model.eval().requires_grad_(False), tokenizer, given
        self.prompts = PromptRenderer(given)
        self.needs_attempts = self.prompts.needs_attempts
        self._student: Any = None
        self._start = StartProbe()

    @classmethod
    def load(cls, given: Mapping[str, Any]) -> "ModelTeacher":
        """From a folder or a hub name; `trust_remote_code` is off unless asked for."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        shared = {"revision": given["revision"], "trust_remote_code": given["trust_remote_code"]}
        try:
            tokenizer = AutoTokenizer.from_pretrained(given["tokenizer"] or given["model"], **shared)
            model = AutoModelForCausalLM.from_pretrained(
                given["model"], dtype=given["dtype"], **_quantized(given), **shared
            )
        except (OSError, ValueError, ImportError) as error:
            raise TokenCreditError(
                f"cannot load the teacher {given['model']!r}: {error}", hint="give a folder or a name of the hub"
            ) from error
        if given["device"] is not None and given["quantization"] == "none":
            model = model.to(given["device"])
        return cls(model, tokenizer, given)

    def check(
        self,
        policy_tokenizer: Any,
        *,
        policy: Any = None,
        rows: Iterable[Mapping[str, Any]] = (),
        temperature: float = 1.0,
    ) -> None:
        """Refuse another vocabulary, another chat template, another EOS, and rows without what the template shows."""
        rows = first_rows(rows)
        check_tokenizers(policy_tokenizer, self.tokenizer)
        check_size(policy_tokenizer, self.model.get_input_embeddings().weight.shape[0])
        ends = end_ids(policy_tokenizer, policy), end_ids(self.tokenizer, self.model)
        check_end(*ends, policy_tokenizer, self.given["eos"])
        kwargs = self.given["chat_template_kwargs"]
        check_chat(policy_tokenizer, self.tokenizer, rows, kwargs, self.given["chat_template"])
        self.prompts.check(rows, policy_tokenizer)
        self._student = policy_tokenizer

    @contextmanager
    def opened(
        self,
        prompt_ids: list[list[int]],
        response_mask: Bool[Tensor, "batch response"],
        rows: list[Mapping[str, Any]],
        policy: Any = None,
    ) -> Iterator[tuple[Any, list[list[int]]]]:
        """The model that scores and the prompts that it sees, for whoever wants more than the sampled tokens."""
        self._join(response_mask.device)
        yield self.model, _prompts(self.prompts, rows, prompt_ids, self._student, response_mask, self.model)

    def _join(self, device: torch.device) -> None:
        """Move to where the policy is, at the first call, unless the teacher has a place of its own."""
        own = next(self.model.parameters()).device
        if self.given["device"] is None and self.given["quantization"] == "none" and own != device:
            self.model = self.model.to(device)

    def after_step(self, policy: Any) -> None:
        """A fixed teacher does not move."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass


class SelfTeacher(_Scoring):
    """The policy as its own teacher: under a privileged prompt, with other weights, or both.

    * live: the weights that sampled. * frozen: a copy of the trainable parameters as they were at the first call.
    * ema: their moving average, θ̄ ← θ̄ + rate (θ − θ̄) after each optimizer step. * base: the LoRA adapter switched off.

    "frozen" and "ema" hold a second copy of the *trainable* parameters, which is small under LoRA; "base" holds none.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.prompts = PromptRenderer(given)
        self.needs_attempts = self.prompts.needs_attempts
        self._student: Any = None
        self._copy: dict[str, Tensor] = {}

    def check(
        self,
        policy_tokenizer: Any,
        *,
        policy: Any = None,
        rows: Iterable[Mapping[str, Any]] = (),
        temperature: float = 1.0,
    ) -> None:
        """Refuse rows without what the template shows, and "base" without an adapter."""
        self.prompts.check(rows, policy_tokenizer)
        if policy is not None:
            self._check_policy(policy)
        self._student = policy_tokenizer

    @contextmanager
    def opened(
        self,
        prompt_ids: list[list[int]],
        response_mask: Bool[Tensor, "batch response"],
        rows: list[Mapping[str, Any]],
        policy: Any = None,
    ) -> Iterator[tuple[Any, list[list[int]]]]:
        """The policy with the teacher's weights, inside, and the prompts that it sees."""
        if policy is None:
            raise TokenCreditError("a self teacher scores with the policy, got none", hint="pass `policy=model`")
        self._check_policy(policy)
        self._remember(policy)
        prompts = _prompts(self.prompts, rows, prompt_ids, self._student, response_mask, policy)
        with self._weights(policy):
            yield policy, prompts

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
        sharded = next((name for name, p in policy.named_parameters() if _is_sharded(name, p)), None)
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

    def _weights(self, policy: Any) -> Any:
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


def _prompts(
    renderer: PromptRenderer,
    rows: list[Mapping[str, Any]],
    prompt_ids: list[list[int]],
    tokenizer: Any,
    response_mask: Tensor,
    model: Any,
) -> list[list[int]]:
    if renderer.text is not None and tokenizer is None:
        raise TokenCreditError("a teacher with a template must be checked first", hint="call `check(policy_tokenizer)`")
    prompts = renderer.prompts(rows, prompt_ids, tokenizer)
    limit = renderer.max_length or getattr(unwrapped(model).config, "max_position_embeddings", None)
    check_fits(prompts, used_widths(response_mask), limit)
    return prompts


def _is_sharded(name: str, parameter: Any) -> bool:
    """DeepSpeed ZeRO-3, FSDP 2 (DTensor) or FSDP 1."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_spec") or "_flat_param" in name


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
