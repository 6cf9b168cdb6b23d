"""Sparse-autoencoder features: mean activation of each latent over the real tokens of a sample, as sparse rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_matrix, load_npz, save_npz, vstack
from torch import Tensor

from tokencredit.collect.models import backbone_of
from tokencredit.errors import TokenCreditError
from tokencredit.recipes.pool.encode import Conversations
from tokencredit.recipes.pool.samples import Pool
from tokencredit.recipes.signals.forward import run_shards
from tokencredit.recipes.signals.load import Scorer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Autoencoder:
    """Encoder of an SAE for the hidden states behind one layer: relu(h W + b), W [width, latents]."""

    weight: Float[Tensor, "width latents"]
    bias: Float[Tensor, " latents"]
    layer: int


def load_autoencoder(path: Path, layer: int, width: int) -> Autoencoder:
    """From safetensors with `W_enc` [width, latents] (or `encoder.weight`, transposed) and `b_enc` (`encoder.bias`)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TokenCreditError(f"cannot read the encoder {path}: {error}", hint="give a safetensors file") from error
    if "W_enc" in tensors:
        weight, bias = tensors["W_enc"], tensors.get("b_enc")
    elif "encoder.weight" in tensors:
        weight, bias = tensors["encoder.weight"].T, tensors.get("encoder.bias")
    else:
        raise TokenCreditError(f"{path} must hold W_enc or encoder.weight, it holds {', '.join(sorted(tensors))}")
    if weight.shape[0] != width:
        raise TokenCreditError(f"{path} encodes states of width {weight.shape[0]}, the model's have {width}")
    bias = torch.zeros(weight.shape[1]) if bias is None else bias
    return Autoencoder(weight=weight.float().contiguous(), bias=bias.float(), layer=layer)


def mean_activations(
    sae: Autoencoder, hidden: Float[Tensor, "batch length width"], real: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch latents"]:
    """Mean over real tokens only: a mean over the padded length would depend on the batch."""
    weight, bias = sae.weight.to(hidden.device), sae.bias.to(hidden.device)
    total = hidden.new_zeros(len(hidden), weight.shape[1], dtype=torch.float32)
    for row in range(len(hidden)):  # one sample at a time: [tokens, latents] of a batch is large
        total[row] = torch.relu(hidden[row, real[row]].float() @ weight + bias).mean(0)
    return total


@torch.no_grad()
def activate(scorer: Scorer, sae: Autoencoder, conversations: Conversations) -> csr_matrix:
    """Return sparse rows of some samples; empty for a sample that could not be encoded."""
    encoded = scorer.encode(conversations)
    sparse = [csr_matrix((1, sae.weight.shape[1]), dtype=np.float32)] * len(encoded)
    backbone = backbone_of(scorer.model)
    for places, ids, real in scorer.batches(encoded):
        states = backbone(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states
        if not -len(states) <= sae.layer < len(states):
            raise TokenCreditError(f"layer {sae.layer} does not exist; the model has states 0…{len(states) - 1}")
        dense = mean_activations(sae, states[sae.layer], real.bool()).numpy(force=True)
        for place, values in zip(places, dense, strict=True):
            sparse[place] = csr_matrix(values[None])
    return vstack(sparse).tocsr()


def activate_pool(scorer: Scorer, sae: Autoencoder, pool: Pool, work: Path) -> csr_matrix:
    """Return sparse rows of the pool; a killed pass goes on at its last shard."""
    paths = run_shards(pool, work, "sae pass", lambda samples, file: save_npz(file, activate(scorer, sae, samples)))
    return vstack([load_npz(path) for path in paths]).tocsr()
