"""The audit as one HTML page: several methods on the same responses, token by token, on one colour scale.

The page draws one response at a time from numbers of one or two bytes each, so that hundreds of thousands of tokens
take a few megabytes. What a model wrote is untrusted: it is made visible here, and the page only ever sets it as text.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tokencredit.batch.masked import chosen
from tokencredit.batch.records import TokenBatch
from tokencredit.diagnostics.agreement import agreement, top_overlap
from tokencredit.diagnostics.concentration import effective_token_ratio, gini, mean_over_responses
from tokencredit.diagnostics.position import position_profile
from tokencredit.diagnostics.quadrants import quadrant_statistics
from tokencredit.files import make_folder, write_bytes
from tokencredit.methods.entropy.quadrants import QUADRANTS
from tokencredit.report.run_page.tokens import PART, visible

SEPARATOR = "\x01"  # between the texts of tokens; control characters of a text are written out, so none holds it
FINE = 400_000  # numbers on the page up to which each takes two bytes
CLIPPED = 0.995  # the share of tokens within the colour scale: a single outlier must not pale everything else
TALLEST = 26  # pixels of a bar

NOTES = {
    "weight": "White: the advantage of the response itself. Blue: more than that, orange: less, or the other sign.",
    "difference": "Blue: more credit than the first method gives, orange: less.",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Audit:
    """Several methods on one batch of responses.

    * `advantages`: per method; the first one is what differences are taken to.
    * `tokens`, `prompts`: texts, a list per response and one text per response; never trusted.
    * `facts`: what the page says of the model, the task and the sampling. `warnings`: sentences above the responses.
    """

    title: str
    batch: TokenBatch
    tokens: Sequence[Sequence[str]]
    prompts: Sequence[str]
    advantages: Mapping[str, Float[Tensor, "batch response"]]
    bases: Float[Tensor, " batch"]
    facts: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


class _Packing(NamedTuple):
    """Bytes per number, and the size of a unit per method and per field: a method and a field may share a name."""

    width: int
    steps: Mapping[str, float]
    field_steps: Mapping[str, float]


def write_audit(audit: Audit, path: Path) -> Path:
    """Write the page, whole or not at all."""
    make_folder(path.parent)
    write_bytes(path, render_audit(audit).encode("utf-8", errors="backslashreplace"))
    return path


def render_audit(audit: Audit) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("tokencredit.report"), autoescape=True, undefined=StrictUndefined)
    environment.filters["visible"] = lambda text: visible(str(text), keep_lines=True)
    data = json.dumps(page_data(audit), ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return environment.get_template("audit.html").render(
        title=audit.title,
        count=len(audit.tokens),
        facts=list(audit.facts.items()),
        warnings=list(audit.warnings),
        names=list(audit.advantages),
        agreement=_agreement(audit),
        spread=[_spread(name, credit, audit) for name, credit in audit.advantages.items()],
        quadrants=_quadrants(audit),
        quadrant_names=QUADRANTS,
        data=Markup(data),  # JSON without "<": it cannot end the script element
        version=version("tokencredit"),
    )


def page_data(audit: Audit) -> dict[str, Any]:
    """What the page's script draws from: texts, and numbers as multiples of a step per method and field."""
    fields = {"entropy": audit.batch.entropies, "surprisal": audit.batch.old_logprobs}
    carried = {name: values.abs() for name, values in fields.items() if values is not None}
    lengths = _lengths(audit.batch)
    numbers = int(lengths.sum()) * (len(audit.advantages) + len(carried))
    width = 2 if numbers <= FINE else 1
    mask = audit.batch.response_mask
    steps = {name: _step(values, mask, width) for name, values in audit.advantages.items()}
    field_steps = {name: _step(values, mask, width) for name, values in carried.items()}
    packing = _Packing(width, steps, field_steps)
    prompts = list(dict.fromkeys(audit.prompts))
    rows = [_response(audit, row, int(length), carried, packing, prompts) for row, length in enumerate(lengths)]
    return {
        "bytes": width,
        "prompts": [visible(text, keep_lines=True) for text in prompts],
        "methods": [{"name": visible(name, keep_lines=True), "step": steps[name]} for name in audit.advantages],
        "fields": {name: {"step": field_steps[name], "scale": _scale([x], mask)} for name, x in carried.items()},
        "scale": _scale(list(audit.advantages.values()), mask),
        "weight_scale": _scale(_weights(audit), mask),
        "difference_scale": _scale(_differences(audit), mask),
        "notes": NOTES,
        "responses": rows,
    }


def _lengths(batch: TokenBatch) -> np.ndarray:
    """Columns up to the last chosen token of each response."""
    places = torch.arange(1, batch.response_mask.shape[1] + 1, device=batch.response_mask.device)
    ends = torch.where(batch.response_mask, places, 0)
    return ends.amax(1).cpu().numpy() if ends.shape[1] else np.zeros(len(ends), dtype=np.int64)


def _response(
    audit: Audit,
    row: int,
    length: int,
    fields: Mapping[str, Tensor],
    packing: _Packing,
    prompts: Sequence[str],
) -> dict[str, Any]:
    batch, mask = audit.batch, audit.batch.response_mask[row, :length]
    texts = [_text(text, last=place + 1 == length) for place, text in enumerate(audit.tokens[row][:length])]
    scored = batch.scored is None or bool(batch.scored[row])

    def packed(values: Tensor, step: float) -> str | float:
        own = values[row, :length]
        if mask.any() and bool((own[mask] == own[mask][0]).all()):
            return float(own[mask][0])  # one number for all tokens
        return _pack(torch.where(mask, own, 0.0), step, packing.width)

    return {
        "prompt": prompts.index(audit.prompts[row]),
        "reward": float(batch.rewards[row]) if scored else None,
        "base": round(float(audit.bases[row]), 6),
        "length": length,
        "text": SEPARATOR.join(texts),
        "unchosen": (~mask).nonzero()[:, 0].tolist(),
        "credit": [packed(credit, packing.steps[name]) for name, credit in audit.advantages.items()],
        "fields": {name: packed(values, packing.field_steps[name]) for name, values in fields.items()},
    }


@lru_cache(maxsize=1 << 16)
def _text(raw: str, *, last: bool) -> str:
    """One token as visible text; a line break shows and breaks the line."""
    if not raw:
        return "∅" if last else PART
    return visible(raw).replace("⏎", "⏎\n")


def _step(values: Tensor, mask: Tensor, width: int) -> float:
    """The size of one unit, so that the largest value takes the whole range of `width` bytes."""
    largest = float(chosen(values, mask).abs().max()) if mask.any() else 0.0
    return largest / (127 if width == 1 else 32_767) or 1.0


def _pack(values: Tensor, step: float, width: int) -> str:
    whole = (values.double() / step).round().cpu().numpy().astype("<i1" if width == 1 else "<i2")
    return base64.b64encode(whole.tobytes()).decode("ascii")


def _scale(values: Sequence[Tensor], mask: Tensor) -> float:
    """The value of full colour: the largest of the page but for a few outliers."""
    sizes = torch.cat([chosen(x, mask)[mask].abs() for x in values]) if values else torch.zeros(0)
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return 1.0
    ordered = sizes.sort().values
    return float(ordered[int(CLIPPED * (len(ordered) - 1))])


def _weights(audit: Audit) -> list[Tensor]:
    """Weights minus one, of responses with an advantage."""
    base = audit.bases[:, None].double()
    safe = torch.where(base != 0, base, 1.0)
    return [torch.where(base != 0, credit / safe - 1.0, 0.0) for credit in audit.advantages.values()]


def _differences(audit: Audit) -> list[Tensor]:
    first, *others = audit.advantages.values()
    return [credit - first for credit in others]


def _agreement(audit: Audit) -> dict[str, dict[str, str]]:
    """Rank correlation and overlap of the top fifth for every pair of methods."""
    mask = audit.batch.response_mask
    cells: dict[str, dict[str, str]] = {name: {} for name in audit.advantages}
    for name, other in combinations(audit.advantages, 2):
        first, second = audit.advantages[name], audit.advantages[other]
        correlation, overlap = agreement(first, second, mask), mean_over_responses(top_overlap(first, second, mask))
        text = f"{correlation.value:.2f} ({overlap.value:.0%})" if correlation.responses else "–"
        cells[name][other] = cells[other][name] = text
    return cells


def _spread(name: str, credit: Tensor, audit: Audit) -> dict[str, Any]:
    mask = audit.batch.response_mask
    profile = [0.0 if value != value else value for value in position_profile(credit.abs(), mask).mean.tolist()]
    largest = max(profile) or 1.0
    return {
        "name": name,
        "gini": _number(mean_over_responses(gini(credit, mask)).value),
        "effective": _number(mean_over_responses(effective_token_ratio(credit, mask)).value * 100, 0) + " %",
        "place": [round(TALLEST * value / largest, 1) for value in profile],
        "place_text": "mean size by tenths: " + ", ".join(_number(value) for value in profile),
    }


def _quadrants(audit: Audit) -> list[dict[str, Any]]:
    if audit.batch.entropies is None:
        return []
    polarity = audit.bases[:, None].expand(audit.batch.response_mask.shape)
    rows = []
    for name, credit in audit.advantages.items():
        shares = quadrant_statistics(credit, audit.batch, polarity=polarity)
        rows.append({"name": name, "shares": [f"{_number(shares[part].mass * 100, 0)} %" for part in QUADRANTS]})
    return rows


def _number(value: float, digits: int = 2) -> str:
    return "–" if value != value else f"{value:.{digits}f}"
