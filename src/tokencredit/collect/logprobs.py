"""Log-probs and entropies of responses from a model: one no-grad pass, the head in tiles.

This is the one path on which our own passes score tokens. Two numbers that are subtracted from each other, such as
ln π − ln π_ref, must both come from it, with the same `rows_per_pass` and under the same autocast: then a difference of
models is all that is left, and a fresh adapter gives exactly 0 (`collect.adapter.policy_and_reference`).

A host's autocast applies to the backbone and never to the head. Rows that are padded on the left are moved to the left
before the pass, so that a row's score depends neither on its neighbours nor on how a model treats padding: learned
positions start at the first token, and a recurrent state never sees padding.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.head.tiles import Readout
from tokencredit.collect.models import backbone_of, causal_of, check_span, eval_mode, head_of
from tokencredit.errors import TokenCreditError

# Inputs beside token ids that a host hands over; TRL's names. Those with one entry per row are cut with the rows.
ExtraInputs = Mapping[str, Any]
MEDIA = ("image", "video", "audio")


class Pass(NamedTuple):
    """Inputs of one forward, and by how many columns each row was moved to the left (None: not at all)."""

    inputs: dict[str, Any]
    shift: Int[Tensor, " batch"] | None

    @property
    def whole(self) -> bool:
        """Whether there is more to read than tokens, so that the part around a text decoder must run."""
        return len(self.inputs.keys() - {"input_ids", "attention_mask", "position_ids", "use_cache"}) > 0

    def states_before(
        self, states: Float[Tensor, "batch sequence hidden"], prompt_length: int, response_length: int
    ) -> Float[Tensor, "batch response hidden"]:
        """States at the positions that predict each response token."""
        return self.columns(states, prompt_length - 1, response_length)

    def columns(self, values: Tensor, first: int, count: int) -> Tensor:
        """The columns first … first + count − 1 of the host's layout."""
        if self.shift is None:
            return values[:, first : first + count]
        at = torch.arange(first, first + count, device=values.device) - self.shift[:, None]
        at = at.clamp_min(0)
        return (
            values.gather(1, at[..., None].expand(-1, -1, values.shape[2]))
            if values.ndim == 3
            else values.gather(1, at)
        )


@torch.no_grad()
def token_logprobs(  # noqa: PLR0913 - a pass and its inputs
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None,
    prompt_length: int,
    response_length: int,
    temperature: float = 1.0,
    position_ids: Int[Tensor, "batch sequence"] | None = None,
    rows_per_pass: int | None = None,
    extra_inputs: ExtraInputs | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """(log π(y_t | s_t), H(π(· | s_t))) of each response token, float32, in nats, at the temperature.

    Responses are the columns prompt_length … prompt_length + response_length − 1 of `input_ids`. Eval mode inside, so
    dropout is off; a [token, vocab] tensor never exists. Columns that are padding hold numbers without meaning.

    Args:
      rows_per_pass: rows in one forward, which bounds the memory of the pass; None: all.
      extra_inputs: what the model's forward reads besides tokens, such as `pixel_values` and `image_grid_thw`. Entries
        with one row per sequence are cut with the rows; images of several patches per row need TRL's `num_images`.

    Raises:
      TokenCreditError: where the tokens stand for images that `extra_inputs` does not have.
    """
    check_span(prompt_length, response_length, input_ids.shape[1])
    check_media(model, input_ids, extra_inputs)
    weight, readout = head_of(model, temperature)
    backbone = backbone_of(model, whole=bool(extra_inputs))
    found = []
    with eval_mode(model):
        for rows in row_slices(input_ids.shape[0], rows_per_pass):
            one = pass_of(input_ids, attention_mask, position_ids, extra_inputs, rows)
            states = one.states_before(backbone(**one.inputs).last_hidden_state, prompt_length, response_length)
            targets = input_ids[rows, prompt_length : prompt_length + response_length]
            found.append(score_states(states, weight, targets, readout))
    logprobs, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logprobs, entropies


def score_states(
    states: Float[Tensor, "batch response hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "batch response"],
    readout: Readout,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """Log-probs and entropies of targets under the head, rows and columns kept."""
    flat = head_logprobs(states.flatten(0, 1), weight, targets.flatten(), readout=readout)
    return flat[0].view(targets.shape), flat[1].view(targets.shape)


def row_slices(rows: int, at_once: int | None) -> list[slice]:
    """The rows in blocks of `at_once`; one block where there are none, so that every rank runs a forward."""
    step = at_once or max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)] or [slice(0, 0)]


def model_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, rows: slice = slice(None)
) -> dict[str, Tensor | bool | None]:
    """Arguments of a scoring pass in the host's layout; without position ids they are the model's own."""
    inputs: dict[str, Tensor | bool | None] = {"input_ids": input_ids[rows], "use_cache": False}
    inputs["attention_mask"] = None if attention_mask is None else attention_mask[rows]
    if position_ids is not None:
        inputs["position_ids"] = position_ids[rows]
    return inputs


def layout_inputs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    extra_inputs: ExtraInputs | None = None,
) -> dict[str, Any]:
    """Inputs of a pass whose rows must keep the host's layout, as those that read attention maps.

    Where rows are padded on the left and the model takes position ids, they are given, so that positions are counted
    from the first token of each row: GPT-2 would count padding otherwise. Rotary positions are relative and need none.
    """
    check_media(model, input_ids, extra_inputs)
    if position_ids is None and attention_mask is not None and bool((attention_mask[:, :1] == 0).any()):
        backbone = backbone_of(model)
        rotary = any(name.endswith("inv_freq") for name, _ in backbone.named_buffers())
        if not rotary and "position_ids" in inspect.signature(type(backbone).forward).parameters:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    return model_inputs(input_ids, attention_mask, position_ids) | rows_of(
        extra_inputs or {}, slice(None), len(input_ids)
    )


def pass_of(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    extra_inputs: ExtraInputs | None = None,
    rows: slice = slice(None),
) -> Pass:
    """Inputs of a scoring pass over some rows, padding on the left moved to the right."""
    inputs: dict[str, Any] = dict(model_inputs(input_ids, attention_mask, position_ids, rows))
    inputs |= rows_of(extra_inputs or {}, rows, input_ids.shape[0])
    if attention_mask is None:
        return Pass(inputs, None)
    shift = (inputs["attention_mask"].bool().cumsum(1) == 0).sum(1)
    shift = torch.where(shift == input_ids.shape[1], 0, shift)  # a row without a token stays where it is
    if not bool(shift.any()):
        return Pass(inputs, None)
    length = input_ids.shape[1]
    at = torch.arange(length, device=shift.device) + shift[:, None]
    inside, at = at < length, at.clamp_max(length - 1)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == at.shape:
            moved = value.gather(1, at)
            inputs[name] = torch.where(inside, moved, torch.zeros_like(moved)) if name != "input_ids" else moved
    return Pass(inputs, shift)


def rows_of(extra: ExtraInputs, rows: slice, batch: int) -> dict[str, Any]:
    """The part of the extra inputs that belongs to some rows; images are found by `num_images` as TRL does."""
    start, stop, _ = rows.indices(batch)
    if start == 0 and stop == batch:
        return {name: value for name, value in extra.items() if name != "num_images"}
    found: dict[str, Any] = {}
    images = list(extra.get("num_images") or [])
    grid, values = extra.get("image_grid_thw"), extra.get("pixel_values")
    if grid is not None and values is not None and images:
        first, last = sum(images[:start]), sum(images[:stop])
        patches = grid.prod(-1)
        found["image_grid_thw"] = grid[first:last]
        found["pixel_values"] = values[int(patches[:first].sum()) : int(patches[:last].sum())]
    for name, value in extra.items():
        if name in found or name == "num_images" or value is None:
            continue
        if not isinstance(value, Tensor) or value.shape[:1] != (batch,):
            raise TokenCreditError(
                f"the input {name!r} of shape {tuple(getattr(value, 'shape', ()))} cannot be cut into rows of a batch "
                f"of {batch}",
                hint="hand over `num_images` too, or score all rows in one pass",
            )
        found[name] = value[rows]
    return found


def check_media(model: nn.Module, input_ids: Tensor, extra_inputs: ExtraInputs | None = None) -> None:
    """Refuse tokens that stand for images, videos or sounds which are not handed over: their scores would be others."""
    if any(name != "num_images" and value is not None for name, value in (extra_inputs or {}).items()):
        return
    config = getattr(causal_of(model), "config", None)
    for kind in MEDIA:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            number = getattr(config, name, None)
            if isinstance(number, int) and bool((input_ids == number).any()):
                raise TokenCreditError(
                    f"the tokens hold {kind} placeholders (id {number}), and the {kind} itself is not given to this "
                    f"pass of {type(causal_of(model)).__name__}",
                    hint="pass `extra_inputs` (pixel_values, …); teachers and collectors without it score text only",
                )
