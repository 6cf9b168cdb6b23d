"""Logits from hidden states, a tile at a time, as the model itself would compute them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokencredit.collect.head.tiles import folded, tile_logits
from tokencredit.collect.models import backbone_of, causal_of, eval_mode, head_of
from tokencredit.errors import TokenCreditError

Read = Callable[[Tensor], Tensor]  # hidden states [token, width] → logits [token, vocab] in float32

PROBE = 6  # tokens of the row on which heads are compared
TOLERANCE, COARSE = 2e-3, 0.125  # relative to the largest logit; COARSE where the model runs in 16 bits


def hidden_states(
    model: nn.Module, ids: Int[Tensor, "batch length"], real: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length width"]:
    """The last hidden states, those that the head reads."""
    states: Tensor = backbone_of(model)(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def reader_of(model: nn.Module, rows: Sequence[Sequence[int]]) -> Read:
    """Return what turns hidden states into the model's logits.

    Some families scale or cap their logits after the head (Granite, Cohere, Gemma 2). What `head_of` knows of that is
    compared with the model's own logits on one short row. A head with a bias or an adapter is called as a module, and
    a constant factor that no table knows is read off that row.

    Args:
      model: a causal language model.
      rows: token ids; the first tokens of the first row are the probe.

    Raises:
      TokenCreditError: the model's logits cannot be rebuilt from its hidden states.
    """
    row = next((list(row[:PROBE]) for row in rows if len(row) > 1), [0, 0])
    ids = torch.tensor([row], device=next(model.parameters()).device)
    with eval_mode(model):
        logits = causal_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
        hidden = hidden_states(model, ids, torch.ones_like(ids))[0]
    tolerance = TOLERANCE if hidden.dtype in (torch.float32, torch.float64) else COARSE
    limit = tolerance * logits.abs().max().clamp_min(1e-3)
    for read in _readers(model):
        rebuilt = read(hidden)
        if rebuilt.shape != logits.shape:
            continue
        if (rebuilt - logits).abs().max() <= limit:
            return read
        factor = float((rebuilt * logits).sum() / rebuilt.square().sum().clamp_min(1e-30))
        if (factor * rebuilt - logits).abs().max() <= limit:
            return partial(_scaled, read, factor)
    raise TokenCreditError(
        f"the logits of {type(causal_of(model)).__name__} cannot be rebuilt from its hidden states",
        hint="its signals would be wrong; take another model",
    )


def _scaled(read: Read, factor: float, hidden: Tensor) -> Tensor:
    return read(hidden) * factor


def _readers(model: nn.Module) -> Iterator[Read]:
    try:
        weight, readout = head_of(model)
    except TokenCreditError:  # a bias, an adapter, or a head that `head_of` does not know
        pass
    else:
        yield lambda hidden: tile_logits(folded(hidden, readout), weight, readout, None).float()
    head: Any = causal_of(model).get_output_embeddings()
    if head is not None:
        yield lambda hidden: head(hidden).float()
