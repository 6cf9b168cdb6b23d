"""Responses as tokens with their credit, made safe to look at. What a model wrote is untrusted text."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import CreditRecord
from tokencredit.methods.entropy.quadrants import QUADRANTS, quadrant_masks
from tokencredit.report.page import visible
from tokencredit.report.run_page.data import polarity_of
from tokencredit.report.run_page.folders import Run, by_label

STEPS = 3  # steps shown: the first, the middle and the last that are recorded
PROMPTS = 4  # prompts a step
RESPONSES = 2  # responses a prompt and method: the best and the worst reward
TOKENS = 60_000  # tokens in the whole page
LONGEST = 2_000  # tokens of one response
PART = "▁"  # a token without text of its own: a part of the character that a later token completes


# Fields besides the advantage that can colour the tokens: name on the page, and the letter of its data attribute.
COLOURS = {"attention entropy": "e", "adapter residual": "r"}
FIELDS = {"attention entropy": "attention_entropies", "adapter residual": "adapter_residuals"}


class Signal(NamedTuple):
    """A token's value of a field, and where it lies between the least and the largest of the record, in [0, 1]."""

    value: float
    strength: float


class TokenView(NamedTuple):
    """One token; without an advantage it was not chosen by the policy.

    * `strength`: |Â| over the largest |Â| of the page, in [0, 1].
    * `weight`: Â over the advantage that the estimator gave the response; None where that is 0 or not recorded.
    * `logprob`: of the policy that sampled, where the record has it.
    * `breaks`: a line may break before the token, because it starts with a space. `lines`: a line ends after it.
    * `signals`: the fields of `COLOURS` that the record has, by letter.
    """

    text: str
    breaks: bool
    lines: bool
    quadrant: str = ""
    advantage: float | None = None
    strength: float = 0.0
    weight: float | None = None
    entropy: float | None = None
    logprob: float | None = None
    signals: Mapping[str, Signal] = MappingProxyType({})


class ResponseView(NamedTuple):
    """One response; `left_out` counts the tokens behind those shown. `reward` is None where nothing scored it."""

    reward: float | None
    net: float
    tokens: list[TokenView]
    left_out: int


class MethodView(NamedTuple):
    """What one method sampled for a prompt, and the credit it gave."""

    label: str
    seed: int | None
    responses: list[ResponseView]


class PromptView(NamedTuple):
    """One prompt at one step, methods side by side."""

    step: int
    prompt: str
    methods: list[MethodView]


def prompt_views(runs: Sequence[Run]) -> list[PromptView]:
    """The prompts to show: at a few steps, first those that most methods answered.

    One run a method (its first with records) and the same steps for all where they share any.
    """
    shown = {label: next((run for run in group if len(run.records)), None) for label, group in by_label(runs).items()}
    present = {label: run for label, run in shown.items() if run is not None}
    records = {
        step: {label: _record_at(run, step) for label, run in present.items() if step in run.records.steps}
        for step in _steps(list(present.values()))
    }
    largest = max((_largest(record) for of_step in records.values() for record in of_step.values()), default=0.0)
    picked = [(step, *item) for step, of_step in records.items() for item in _choose(of_step)]
    count = sum(len(rows) for _, _, rows_of in picked for rows in rows_of.values())
    limit = max(50, min(LONGEST, TOKENS // max(count, 1)))
    return [
        PromptView(
            step,
            visible(prompt, keep_lines=True),
            [
                MethodView(
                    visible(label), present[label].seed, response_views(records[step][label], rows, limit, largest)
                )
                for label, rows in rows_of.items()
            ],
        )
        for step, prompt, rows_of in picked
    ]


def _choose(records: dict[str, CreditRecord]) -> list[tuple[str, dict[str, list[int]]]]:
    """Prompts of one step with the rows of every method: those that most methods share, then those with both outcomes.

    Where methods share no prompt, each shows its own.
    """
    rows_of: dict[str, dict[str, list[int]]] = {}
    for label, record in records.items():
        for prompt, rows in _rows_by_prompt(record).items():
            rows_of.setdefault(prompt, {})[label] = rows
    ranked = sorted(rows_of.items(), key=lambda item: (-len(item[1]), -sum(map(len, item[1].values()))))
    if not ranked or len(ranked[0][1]) > 1:
        return ranked[:PROMPTS]
    return [item for label in records for item in [item for item in ranked if label in item[1]][:PROMPTS]]


def _steps(runs: Sequence[Run]) -> list[int]:
    sets = [set(run.records.steps) for run in runs]
    if not sets:
        return []
    common = sorted(set.intersection(*sets) or set.union(*sets))
    picked = {common[round(k * (len(common) - 1) / (STEPS - 1))] for k in range(STEPS)}
    return sorted(picked, reverse=True)  # the newest first


def _record_at(run: Run, step: int) -> CreditRecord:
    return run.records.read(run.records.steps.index(step))


def _rows_by_prompt(record: CreditRecord) -> dict[str, list[int]]:
    """The best and the worst response of every prompt, and one without a score; prompts without text go by group."""
    rewards = record.batch.rewards.tolist()
    filled = record.batch.response_mask.any(1).tolist()
    found: dict[str, list[int]] = {}
    for row, group in enumerate(record.batch.group_ids.tolist()):
        text = record.prompts[row] if row < len(record.prompts) else f"(group {group})"
        if filled[row]:
            found.setdefault(text, []).append(row)
    for text, rows in found.items():
        ordered = sorted((row for row in rows if _is_scored(record, row)), key=lambda row: (-rewards[row], row))
        unscored = [row for row in rows if not _is_scored(record, row)]
        same = bool(ordered) and rewards[ordered[0]] == rewards[ordered[-1]]
        extremes = ordered[:1] if same or not ordered else [*ordered[: RESPONSES - 1], ordered[-1]]
        found[text] = [*extremes, *unscored[:1]]
    return found


def _is_scored(record: CreditRecord, row: int) -> bool:
    return record.batch.scored is None or bool(record.batch.scored[row])


def _largest(record: CreditRecord) -> float:
    """The largest |Â| of a record."""
    credit = chosen(record.advantages, record.batch.response_mask)
    return float(credit.abs().max()) if credit.numel() else 0.0


def response_views(
    record: CreditRecord, rows: Sequence[int], limit: int = LONGEST, largest: float | None = None
) -> list[ResponseView]:
    """The tokens of some responses; colours are relative to `largest`, or to the largest |Â| of the record."""
    credit = chosen(record.advantages, record.batch.response_mask)
    largest = _largest(record) if largest is None else largest
    quadrants = _quadrant_names(record)
    return [_response_view(record, credit[row], largest, quadrants[row], row, limit) for row in rows]


def _quadrant_names(record: CreditRecord) -> list[list[str]]:
    batch = record.batch
    names = [[""] * batch.response_mask.shape[1] for _ in range(len(batch.rewards))]
    if batch.entropies is None:
        return names
    masks = quadrant_masks(polarity_of(record), batch)
    for name in QUADRANTS:
        for row, column in masks[name].nonzero().tolist():
            names[row][column] = name
    return names


def _response_view(
    record: CreditRecord, credit: Tensor, largest: float, quadrants: list[str], row: int, limit: int
) -> ResponseView:
    batch = record.batch
    mask = batch.response_mask[row].tolist()
    length = max((column + 1 for column, is_chosen in enumerate(mask) if is_chosen), default=0)
    entropies, logprobs = (_listed(values, row, length) for values in (batch.entropies, batch.old_logprobs))
    host = 0.0 if batch.host_advantages is None else float(batch.host_advantages[row])
    signals = {COLOURS[name]: _signals(record, name, row) for name in COLOURS if _field(record, name) is not None}
    views = []
    for column, advantage in enumerate(credit[: min(length, limit)].tolist()):
        raw = _raw_text(record, row, column)
        text = _token_text(raw, is_last=column + 1 == length)
        view = TokenView(text, breaks=raw.startswith(" "), lines=raw.endswith("\n"), quadrant=quadrants[column])
        if mask[column]:
            view = view._replace(
                advantage=advantage,
                strength=abs(advantage) / (largest or 1.0),
                weight=advantage / host if host else None,
                entropy=entropies[column],
                logprob=logprobs[column],
                signals={letter: values[column] for letter, values in signals.items()},
            )
        views.append(view)
    reward = float(batch.rewards[row]) if _is_scored(record, row) else None
    return ResponseView(reward, float(credit.sum()), views, length - len(views))


def _raw_text(record: CreditRecord, row: int, column: int) -> str:
    """The token as it was decoded, or its id where the record keeps no texts."""
    texts = record.tokens[row] if row < len(record.tokens) else []
    return texts[column] if column < len(texts) else f"⟨{int(record.batch.response_ids[row, column])}⟩"


def _listed(values: Tensor | None, row: int, length: int) -> list[float | None]:
    return [None] * length if values is None else values[row].tolist()


def _token_text(raw: str, *, is_last: bool) -> str:
    """The token as text: each ⏎ breaks the line, one at the end outside the token."""
    if not raw:
        return "∅" if is_last else PART
    return visible(raw).replace("⏎", "⏎\n").removesuffix("\n")


def carries(name: str, prompt: PromptView) -> bool:
    """Whether a token of a prompt's responses has the field `name` of `COLOURS`."""
    letter = COLOURS[name]
    tokens = (token for method in prompt.methods for response in method.responses for token in response.tokens)
    return any(letter in token.signals for token in tokens)


def _field(record: CreditRecord, name: str) -> Tensor | None:
    return getattr(record.batch, FIELDS[name])


def _signals(record: CreditRecord, name: str, row: int) -> list[Signal]:
    values, mask = record.batch.require(FIELDS[name]), record.batch.response_mask
    chosen_values = values[mask]
    least, largest = (float(chosen_values.min()), float(chosen_values.max())) if chosen_values.numel() else (0.0, 0.0)
    width = largest - least
    strengths = (
        torch.nan_to_num((values[row] - least) / width).clamp(0, 1) if width > 0 else torch.zeros(len(values[row]))
    )
    return [Signal(value, strength) for value, strength in zip(values[row].tolist(), strengths.tolist(), strict=True)]
