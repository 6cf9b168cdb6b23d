"""Log-probs and entropies of responses from a model: one no-grad pass, the head in tiles.

This is the one path on which our own passes score tokens. Two numbers that are subtracted from each other, such as
ln π − ln π_ref, must both come from it, with the same `rows_per_pass` and under the same autocast: then a difference of
models is all that is left, and a fresh adapter gives exactly 0 (`collect.adapter.policy_and_reference`).

A host's autocast applies to the backbone and never to the head. Rows that are padded on the left are moved to the left
before the pass, so that a row's score depends neither on its neighbours nor on how a model treats padding: learned
positions start at the first token, and a recurrent state never sees padding.
"""

import inspect
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.head.tiles import Readout
from tokencredit.collect.models import backbone_of, causal_of, eval_mode, head_of
from tokencredit.collect.rollout import ExtraInputs, Sequences, takes
from tokencredit.errors import TokenCreditError

MEDIA = ("image", "video", "audio")


class Pass(NamedTuple):
    """Inputs of one forward, and by how many columns each row was moved to the left (None: not at all)."""

    inputs: dict[str, Any]
    shift: Int[Tensor, " batch"] | None

    def run(self, model: nn.Module) -> Any:
        """The output of the model's backbone; with more to read than tokens, of the part around a text decoder."""
        extra = self.inputs.keys() - {"input_ids", "attention_mask", "position_ids", "use_cache"}
        return backbone_of(model, whole=len(extra) > 0)(**self.inputs)

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
        if values.ndim == 3:
            at = at[..., None].expand(-1, -1, values.shape[2])
        return values.gather(1, at)


@takes(Sequences, after=1)
@torch.no_grad()
def token_logprobs(
    model: nn.Module, sequences: Sequences, temperature: float = 1.0, rows_per_pass: int | None = None
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """(log π(y_t | s_t), H(π(· | s_t))) of each response token, float32, in nats, at the temperature.

    Eval mode inside, so dropout is off; a [token, vocab] tensor never exists. Columns that are padding hold numbers
    without meaning.

    Args:
      sequences: `Sequences`, or its fields in its place: `token_logprobs(model, input_ids, attention_mask,
        prompt_length, response_length, position_ids=…, extra_inputs=…)`.
      rows_per_pass: rows in one forward, which bounds the memory of the pass; None: all.

    Raises:
      TokenCreditError: where the tokens stand for images that `extra_inputs` does not have.
    """
    check_media(model, sequences)
    weight, readout = head_of(model, temperature)
    prompt, response = sequences.prompt_length, sequences.response_length
    scores = []
    with eval_mode(model):
        for rows in row_slices(sequences.input_ids.shape[0], rows_per_pass):
            one = pass_of(sequences, rows)
            states = one.states_before(one.run(model).last_hidden_state, prompt, response)
            scores.append(score_states(states, weight, sequences.response_ids[rows], readout))
    logprobs, entropies = (torch.cat(parts) for parts in zip(*scores, strict=True))
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


def model_inputs(sequences: Sequences, rows: slice = slice(None)) -> dict[str, Any]:
    """Arguments of a pass in the host's layout; without position ids they are the model's own."""
    mask, positions = sequences.attention_mask, sequences.position_ids
    inputs: dict[str, Any] = {"input_ids": sequences.input_ids[rows], "use_cache": False}
    inputs["attention_mask"] = None if mask is None else mask[rows]
    if positions is not None:
        inputs["position_ids"] = positions[rows]
    return inputs | rows_of(sequences.extra_inputs or {}, rows, len(sequences.input_ids))


def layout_pass(model: nn.Module, sequences: Sequences) -> Pass:
    """A pass whose rows must keep the host's layout, as those that read attention maps.

    Where rows are padded on the left and the model takes position ids, they are given, so that positions are counted
    from the first token of each row: GPT-2 would count padding otherwise. Rotary positions are relative and need none.
    """
    check_media(model, sequences)
    inputs, mask = model_inputs(sequences), sequences.attention_mask
    if sequences.position_ids is None and mask is not None and bool((mask[:, :1] == 0).any()):
        backbone = backbone_of(model)
        rotary = any(name.endswith("inv_freq") for name, _ in backbone.named_buffers())
        if not rotary and "position_ids" in inspect.signature(type(backbone).forward).parameters:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return Pass(inputs, None)


def pass_of(sequences: Sequences, rows: slice = slice(None)) -> Pass:
    """Inputs of a scoring pass over some rows, padding on the left moved to the right."""
    inputs = model_inputs(sequences, rows)
    if sequences.attention_mask is None:
        return Pass(inputs, None)
    length = sequences.input_ids.shape[1]
    shift = (inputs["attention_mask"].bool().cumsum(1) == 0).sum(1)
    shift = torch.where(shift == length, 0, shift)  # a row without a token stays where it is
    if not bool(shift.any()):
        return Pass(inputs, None)
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


def check_media(model: nn.Module, sequences: Sequences) -> None:
    """Refuse tokens that stand for images, videos or sounds which are not handed over: their scores would be others."""
    if any(name != "num_images" and value is not None for name, value in (sequences.extra_inputs or {}).items()):
        return
    config = getattr(causal_of(model), "config", None)
    for kind in MEDIA:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            number = getattr(config, name, None)
            if isinstance(number, int) and bool((sequences.input_ids == number).any()):
                raise TokenCreditError(
                    f"the tokens hold {kind} placeholders (id {number}), and the {kind} itself is not given to this "
                    f"pass of {type(causal_of(model)).__name__}",
                    hint="pass `extra_inputs` (pixel_values, …); teachers and collectors without it score text only",
                )
