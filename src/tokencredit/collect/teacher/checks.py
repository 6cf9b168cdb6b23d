"""What must agree before a teacher's log-probs mean anything: vocabularies, templates, ends, positions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokencredit.collect.teacher.prompts import render
from tokencredit.errors import TokenCreditError

PROBES = (
    "\n\n",
    " the",
    "2+2=4",
    "<think>\n",
    "Ünïcödé 漢字",
    "def f(x):\n    return x**2",
    "\\boxed{42}",
    "0123456789",
)
DECODED = 256  # ids, evenly spread, whose texts are compared
SHARED = (
    "sampled-token distillation compares the same token id; use a teacher of the student's family, or a "
    "cross-tokenizer loss such as TRL's GOLD"
)
WARN_NATS, REFUSE_NATS = 0.02, 0.2  # mean |Δ| between two scorings of the same tokens
LEAST = 64  # tokens below which a comparison of shifts means nothing


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Every id that the student can sample must be the same token for the teacher."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    pairs = [(text, _encode(student, text), _encode(teacher, text)) for text in PROBES]
    differ = [pair for pair in pairs if pair[1] != pair[2]]
    missing = [token for token, number in ours.items() if theirs.get(token) != number]
    if differ and missing:
        text, own, other = differ[0]
        raise TokenCreditError(
            f"teacher and student do not share a tokenizer: {len(differ)} of {len(PROBES)} probe strings differ, first "
            f"{text!r}: student {own}, teacher {other}",
            hint=SHARED,
        )
    if missing:
        token = min(missing, key=ours.__getitem__)
        raise TokenCreditError(
            f"teacher and student do not share a tokenizer: {len(missing)} of {len(ours)} tokens differ, first "
            f"{token!r}: student {ours[token]}, teacher {theirs.get(token, 'none')}",
            hint=SHARED,
        )
    step = max(1, len(ours) // DECODED)
    for number in sorted(ours.values())[::step]:
        texts = student.decode([number]), teacher.decode([number])
        if texts[0] != texts[1]:
            raise TokenCreditError(
                f"token {number} decodes to {texts[0]!r} for the student and to {texts[1]!r} for the teacher",
                hint=SHARED,
            )


def check_size(student: Any, rows: int, what: str = "teacher") -> None:
    """The embedding may be padded, but every id of the student's tokenizer must have a row."""
    largest = max(student.get_vocab().values())
    if largest >= rows:
        raise TokenCreditError(
            f"the student's tokenizer has ids up to {largest}, the {what}'s vocabulary {rows} rows", hint=SHARED
        )


def check_end(student_ends: Iterable[int], teacher_ends: Iterable[int], tokenizer: Any, policy: str = "refuse") -> None:
    """Refuse a teacher that does not end where the student does: it gives the student's end next to no probability.

    A student ends its responses with its tokenizer's EOS; generation settings may list further ids, which it rarely
    samples. So it is the EOS that the teacher must know, not any id of the list. `tokenizer` is the student's.
    """
    own, other = sorted(set(student_ends)), sorted(set(teacher_ends))
    eos = getattr(tokenizer, "eos_token_id", None)
    needed = {eos} if eos in own else set(own)
    if policy == "allow" or not other or needed & set(other):
        return
    raise TokenCreditError(
        f"the student ends with {_named(own, tokenizer)}, the teacher with {_named(other, tokenizer)}: the teacher "
        "does not score the student's EOS, lengths will grow",
        hint="train the student with the teacher's EOS, or set `eos: allow` on the teacher",
    )


def end_ids(tokenizer: Any, model: Any = None) -> list[int]:
    """The ids that end a response, of a tokenizer and a model's generation settings."""
    found = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    settings = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return found + ([settings] if isinstance(settings, int) else list(settings or ()))


def check_chat(
    student: Any, teacher: Any, rows: Iterable[Mapping[str, Any]], kwargs: Mapping[str, Any], policy: str = "refuse"
) -> None:
    """A conversation must look to the teacher as it was trained to see one."""
    row = next(iter(rows), None)
    talks = row is not None and not isinstance(row.get("prompt", ""), str)
    if policy == "allow" or not talks or not (teacher.chat_template and student.chat_template):
        return
    assert row is not None
    own, other = (render(row["prompt"], tokenizer, kwargs) for tokenizer in (student, teacher))
    if own == other:
        return
    at = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    shown = [repr(tokenizer.decode(ids[at : at + 1])) for tokenizer, ids in ((student, own), (teacher, other))]
    raise TokenCreditError(
        f"prompt ids differ at position {at} of {len(own)}: student {shown[0]}, teacher {shown[1]}",
        hint="use one chat template and one thinking switch, or set `chat_template: allow`: the teacher then scores "
        "the student's rendering",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What a start-up probe found, in nats; `warnings` are sentences for the log."""

    repeat_mean: float
    repeat_p99: float
    repeat_max: float
    gap_mean: float
    end_gap: float | None
    warnings: tuple[str, ...]


def probe(
    score: Callable[[], Float[Tensor, "batch response"]],
    response_ids: Int[Tensor, "batch response"],
    response_mask: Bool[Tensor, "batch response"],
    student_logprobs: Float[Tensor, "batch response"],
    *,
    ends: Sequence[int] = (),
) -> ProbeReport:
    """Score a few rollouts twice and look at them; refuses a teacher that does not repeat itself or is off by one.

    `score` calls the teacher on these rollouts; `ends` are the ids that end a response.
    """
    first, second = score(), score()
    repeat = (first - second).abs()[response_mask].float()
    mean = float(repeat.mean()) if repeat.numel() else 0.0
    if mean > REFUSE_NATS:
        raise TokenCreditError(
            f"the teacher scores the same tokens {mean:.3f} nats apart on average, at most {REFUSE_NATS} is allowed",
            hint="look for sampling, dropout or a temperature that the server applies only sometimes",
        )
    check_shift(first, student_logprobs, response_mask)
    gap = torch.where(response_mask, first - student_logprobs, 0.0)
    end_gap, warning = end_warning(gap, response_ids, response_mask, ends)
    warnings = [warning] if warning else []
    signs = gap[response_mask].sign().unique()
    if int(response_mask.sum()) >= LEAST and len(signs) == 1 and float(signs[0]) != 0.0:
        warnings.append(
            "the teacher's log-ratio has one sign on all tokens: it looks like a divergence, not a log-ratio"
        )
    if mean > WARN_NATS:
        warnings.append(f"the teacher scores the same tokens {mean:.3f} nats apart on average")
    return ProbeReport(
        repeat_mean=mean,
        repeat_p99=float(repeat.quantile(0.99)) if repeat.numel() else 0.0,
        repeat_max=float(repeat.max()) if repeat.numel() else 0.0,
        gap_mean=float(gap.sum() / response_mask.sum().clamp_min(1)),
        end_gap=end_gap,
        warnings=tuple(warnings),
    )


def check_shift(
    teacher: Float[Tensor, "batch response"],
    student: Float[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
) -> None:
    """Refuse log-probs that fit the student's better when moved by one token: someone is off by one."""
    both = mask[:, 1:] & mask[:, :-1]
    if int(both.sum()) < LEAST:
        return
    straight = (teacher - student)[:, 1:][both].abs().mean()
    for by, moved in ((1, teacher[:, :-1] - student[:, 1:]), (-1, teacher[:, 1:] - student[:, :-1])):
        if float(moved[both].abs().mean()) < 0.5 * float(straight):
            raise TokenCreditError(
                f"teacher log-probs fit the student better when shifted by {by}: mean |gap| "
                f"{float(moved[both].abs().mean()):.3f} nats instead of {float(straight):.3f}",
                hint="log-prob t must be that of token t given the tokens before it",
            )


def end_warning(
    gap: Float[Tensor, "batch response"],
    response_ids: Int[Tensor, "batch response"],
    mask: Bool[Tensor, "batch response"],
    ends: Sequence[int],
) -> tuple[float | None, str]:
    """Median gap at the ends of finished rollouts, and a sentence where the teacher cannot be meant to end there."""
    at_end = mask & torch.isin(response_ids, torch.tensor(list(ends), dtype=response_ids.dtype, device=mask.device))
    if not bool(at_end.any()) or not bool((mask & ~at_end).any()):
        return None, ""
    here, elsewhere = float(gap[at_end].median()), float(gap[mask & ~at_end].median())
    if here < -5.0 and elsewhere > -1.0:
        return here, (
            f"the teacher's log-ratio is {here:.1f} nats at the student's EOS and {elsewhere:.1f} elsewhere: lengths "
            "will grow; map or train the teacher's EOS"
        )
    return here, ""


def _encode(tokenizer: Any, text: str) -> list[int] | str:
    """Ids without special tokens, or the name of the error: two tokenizers may refuse the same text."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # a tokenizer may raise anything at a character that it does not know
        return type(error).__name__


def _named(ids: Sequence[int], tokenizer: Any) -> str:
    return " or ".join(f"{tokenizer.decode([number])!r} ({number})" for number in ids) or "nothing"
