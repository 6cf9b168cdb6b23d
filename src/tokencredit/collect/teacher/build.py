"""Teachers: who gives the log-probs of the sampled tokens that distillation needs, built from a config.

A teacher is asked for one number per sampled token; a `[tokens, vocab]` tensor never exists. It scores the student's
own token ids, never a text that it would tokenize again.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from tokencredit.collect.teacher.base import TeacherRequest
from tokencredit.errors import TokenCreditError, unknown

# What each kind accepts beside `kind`, with its default; REQUIRED has none.
REQUIRED = object()
PROMPT_KEYS: dict[str, Any] = {"template": None, "columns": {}, "chat_template_kwargs": {}, "max_length": None}
KINDS: dict[str, dict[str, Any]] = {
    "model": {
        "model": REQUIRED,
        "tokenizer": None,  # of the teacher; None: the one beside the model
        "revision": None,
        "device": None,  # None: the policy's
        "dtype": "auto",
        "quantization": "none",
        "trust_remote_code": False,
        "batch_size": 8,
        "eos": "refuse",
        "chat_template": "refuse",
        **PROMPT_KEYS,
    },
    "self": {"weights": "live", "ema_rate": 0.05, "batch_size": 8, **PROMPT_KEYS},
    "base": {"batch_size": 8, **PROMPT_KEYS},
    "server": {
        "url": REQUIRED,
        "model": None,  # the name it is served under; None: the only one
        "tokenizer": None,  # None: the server's `/tokenize` route is asked
        "batch_size": 8,
        "connections": 4,
        "timeout": 600.0,
        "eos": "refuse",
        "chat_template": "refuse",
        **PROMPT_KEYS,
    },
}
CHOICES: dict[str, tuple[str, ...]] = {
    "weights": ("live", "frozen", "ema", "base"),
    "quantization": ("none", "8bit", "4bit"),
    "eos": ("refuse", "allow"),
    "chat_template": ("refuse", "allow"),
}


@runtime_checkable
class Teacher(Protocol):
    """Scores the tokens that a student sampled."""

    needs_attempts: bool
    """Whether each row must carry `attempt`: the text of another correct response to its prompt, or None."""

    def check(
        self,
        policy_tokenizer: Any,
        *,
        policy: Any = None,
        rows: Iterable[Mapping[str, Any]] = (),
        temperature: float = 1.0,
    ) -> None:
        """Refuse before training what could not be scored; `rows` are those of the training data."""
        ...

    def score(self, request: TeacherRequest) -> Float[Tensor, "batch response"]:
        """ln π_T of the chosen tokens in nats at the request's temperature, float32, 0 elsewhere, without gradient."""
        ...

    def after_step(self, policy: Any) -> None:
        """To be called after every optimizer step; teachers that average weights move here."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What must be saved so that a resumed run has the same teacher; empty for most."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...


@runtime_checkable
class LocalTeacher(Teacher, Protocol):
    """A teacher whose whole distribution can be read here, not its sampled tokens alone."""

    def score_with_entropies(
        self, request: TeacherRequest
    ) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
        """`score`, and the teacher's entropy in front of each chosen token, from one pass."""
        ...

    def opened(
        self, prompt_ids: list[list[int]], response_mask: Tensor, rows: Sequence[Mapping[str, Any]], policy: Any = None
    ) -> AbstractContextManager[tuple[Any, list[list[int]]]]:
        """The model that scores, with the weights that it scores with, and the prompts that it sees."""
        ...


def build_teacher(config: Mapping[str, Any]) -> Teacher:
    """The teacher that the `teacher:` section of a config describes.

    * `kind: model`: another checkpoint, on its own device, quantised or not.
    * `kind: self`: the policy itself under a privileged prompt (`template`), with its `live`, `frozen`, `ema` or `base`
      (adapter off) weights.
    * `kind: base`: the policy with its adapter off; with the same prompt this is a reference, not a better teacher.
    * `kind: server`: a model behind `vllm serve`, asked for prompt log-probs.

    The keys of each kind are in `KINDS`; docs/teachers.md explains them. Local models are loaded here.
    """
    given = resolve_teacher(config)
    kind = given.pop("kind")
    if kind == "server":
        from tokencredit.collect.teacher.server import ServerTeacher

        return ServerTeacher(given)
    from tokencredit.collect.teacher import model as teacher_model

    if kind == "model":
        return teacher_model.ModelTeacher.load(given)
    if kind == "base":
        return teacher_model.SelfTeacher({**given, "weights": "base", "ema_rate": 0.0})
    if given["template"] is None and given["weights"] == "live":
        raise TokenCreditError(
            "teacher `self` with live weights and no `template` is the student: its log-ratio is 0 everywhere",
            hint="give it a privileged prompt, such as `template: answer`, or other weights: frozen, ema, base",
        )
    return teacher_model.SelfTeacher(given)


def resolve_teacher(config: Any) -> dict[str, Any]:
    """The config with defaults filled in; a key or value that cannot be is named with what can. Nothing is loaded."""
    if not isinstance(config, Mapping) or "kind" not in config:
        raise TokenCreditError(
            f"`teacher` is a mapping with `kind`, one of {sorted(KINDS)}, got {config!r}",
            hint="for example `teacher: {kind: model, model: path/to/checkpoint}`",
        )
    if not isinstance(config["kind"], str) or config["kind"] not in KINDS:
        raise unknown("teacher kind", str(config["kind"]), KINDS)
    keys = KINDS[config["kind"]]
    for key, value in config.items():
        if key != "kind" and key not in keys:
            raise unknown(f"key of teacher {config['kind']!r}", str(key), keys)
        if key in CHOICES and value not in CHOICES[key]:
            raise TokenCreditError(f"`{key}` of the teacher must be one of {list(CHOICES[key])}, got {value!r}")
    given = keys | dict(config)
    missing = [key for key, value in given.items() if value is REQUIRED]
    if missing:
        raise TokenCreditError(f"teacher {config['kind']!r} needs `{missing[0]}`")
    _check_kinds(given)
    _check_numbers(given)
    return given


def _check_kinds(given: Mapping[str, Any]) -> None:
    """Refuse values of the wrong type: YAML reads `yes` and `3` as what they look like."""
    for key in ("model", "tokenizer", "revision", "url", "template"):
        value = given.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise TokenCreditError(f"`{key}` of the teacher must be a text, got {value!r}", hint="put it in quotes")
    for key in ("columns", "chat_template_kwargs"):
        value = given.get(key, {})
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise TokenCreditError(f"`{key}` of the teacher must be a mapping from names, got {value!r}")
    if not all(isinstance(column, str) for column in given.get("columns", {}).values()):
        raise TokenCreditError(f"`columns` of the teacher must name columns by texts, got {given['columns']!r}")
    if not isinstance(given.get("trust_remote_code", False), bool):
        raise TokenCreditError(
            f"`trust_remote_code` of the teacher must be true or false, got {given['trust_remote_code']!r}"
        )
    limit = given["max_length"]
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise TokenCreditError(
            f"`max_length` of the teacher must be a whole number of tokens of at least 1, got {limit!r}"
        )


def _check_numbers(given: Mapping[str, Any]) -> None:
    for key in ("batch_size", "connections"):
        value = given.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TokenCreditError(f"`{key}` of the teacher must be a whole number of at least 1, got {value!r}")
    rate = given.get("ema_rate", 0.05)
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0.0 < rate <= 1.0:
        raise TokenCreditError(f"`ema_rate` of the teacher must be in (0, 1], got {rate!r}")
    timeout = given.get("timeout", 1.0)
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < float("inf"):
        raise TokenCreditError(f"`timeout` of the teacher must be a number of seconds above 0, got {timeout!r}")
