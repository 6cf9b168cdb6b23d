"""Sparse-autoencoder features: mean activation of each latent over the real tokens of a sample, as sparse rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_matrix, load_npz, save_npz, vstack
from torch import Tensor

from tokencredit.errors import TokenCreditError
from tokencredit.progress import bar
from tokencredit.recipes.encode import encode
from tokencredit.recipes.forward import SHARD, Scorer, _batches, _pad
from tokencredit.recipes.pool import Pool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Autoencoder:
    """Encoder of an SAE for the hidden states behind one layer: relu(h W + b), W [width, latents]."""

    weight: Float[Tensor, "width latents"]
    bias: Float[Tensor, " latents"]
    layer: int


def load_autoencoder(path: Path, layer: int, width: int) -> Autoencoder:
    """From safetensors with `W_enc` [width, latents] (or `encoder.weight`, transposed) and `b_enc` (`encoder.bias`)."""
    from safetensors.torch import load_file

    tensors = load_file(path)
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
    total = torch.zeros(len(hidden), sae.weight.shape[1])
    for row in range(len(hidden)):  # one sample at a time: [tokens, latents] of a batch is large
        total[row] = torch.relu(hidden[row, real[row]].float() @ sae.weight + sae.bias).mean(0)
    return total


@torch.no_grad()
def activate(scorer: Scorer, sae: Autoencoder, conversations: list[list[dict[str, str]]]) -> csr_matrix:
    """Sparse rows of some samples."""
    encoded = [encode(scorer.tokenizer, messages, scorer.max_length) for messages in conversations]
    rows: dict[int, csr_matrix] = {}
    for batch in _batches([len(item.ids) for item in encoded], scorer.batch_tokens):
        ids, real = _pad(scorer, [encoded[row].ids for row in batch])
        states = scorer.model.base_model(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states
        if not -len(states) <= sae.layer < len(states):
            raise TokenCreditError(f"layer {sae.layer} does not exist; the model has states 0…{len(states) - 1}")
        dense = mean_activations(sae, states[sae.layer], real.bool()).numpy(force=True)
        rows |= {row: csr_matrix(values) for row, values in zip(batch, dense, strict=True)}
    return vstack([rows[row] for row in range(len(encoded))]).tocsr()


def activate_pool(scorer: Scorer, sae: Autoencoder, pool: Pool, work: Path) -> csr_matrix:
    """Sparse rows of the pool; a killed pass goes on at its last shard."""
    work.mkdir(parents=True, exist_ok=True)
    paths = []
    with bar("sae pass", len(pool)) as advance:
        for start in range(0, len(pool), SHARD):
            positions = np.arange(start, min(start + SHARD, len(pool)), dtype=np.int32)
            paths.append(work / f"{start:09d}.npz")
            if not paths[-1].is_file():
                rows = activate(scorer, sae, [sample["messages"] for sample in pool.samples(positions)])
                partial = paths[-1].with_suffix(".partial.npz")
                save_npz(partial, rows)
                partial.replace(paths[-1])
            advance(len(positions))
    return vstack([load_npz(path) for path in paths]).tocsr()
