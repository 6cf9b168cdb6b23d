"""Log-probs and entropies of responses from a model: one no-grad pass, the head in tiles."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokencredit.collect.head import head_logprobs
from tokencredit.collect.head_tiles import Readout
from tokencredit.collect.models import backbone_of, check_span, eval_mode, head_of


@torch.no_grad()
def token_logprobs(
    model: nn.Module,
    input_ids: Int[Tensor, "batch sequence"],
    attention_mask: Int[Tensor, "batch sequence"] | Bool[Tensor, "batch sequence"] | None,
    prompt_length: int,
    response_length: int,
    temperature: float = 1.0,
    position_ids: Int[Tensor, "batch sequence"] | None = None,
    rows_per_pass: int | None = None,
) -> tuple[Float[Tensor, "batch response"], Float[Tensor, "batch response"]]:
    """(log π(y_t | s_t), H(π(· | s_t))) of each response token, float32, in nats, at the temperature.

    Responses are the columns prompt_length … prompt_length + response_length − 1 of `input_ids`. Eval mode inside, so
    dropout is off; a [token, vocab] tensor never exists. `rows_per_pass` bounds the memory of the pass itself. Columns
    that are padding hold numbers without meaning.
    """
    check_span(prompt_length, response_length, input_ids.shape[1])
    weight, readout = head_of(model, temperature)
    found = []
    with eval_mode(model):
        for rows in torch.arange(input_ids.shape[0]).split(rows_per_pass or max(input_ids.shape[0], 1)):
            chosen = slice(int(rows[0]), int(rows[-1]) + 1)
            hidden = backbone_of(model)(**model_inputs(input_ids, attention_mask, position_ids, chosen))
            states = hidden.last_hidden_state[:, prompt_length - 1 : prompt_length - 1 + response_length]
            targets = input_ids[chosen, prompt_length : prompt_length + response_length]
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


def model_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, rows: slice = slice(None)
) -> dict[str, Tensor | bool | None]:
    """Arguments of a scoring pass; without position ids they are the model's own, as in TRL's pass."""
    inputs: dict[str, Tensor | bool | None] = {"input_ids": input_ids[rows], "use_cache": False}
    inputs["attention_mask"] = None if attention_mask is None else attention_mask[rows]
    if position_ids is not None:
        inputs["position_ids"] = position_ids[rows]
    return inputs
