"""A stand-in on the CPU for the kernel of flash-attn, which needs a GPU: transformers' own code around it runs."""

import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> Tensor:
    """What `flash_attn_varlen_func` computes, one sequence after another."""
    assert causal
    parts = []
    for first, stop in pairwise(cu_seqlens_q.tolist()):
        own, keys, values = (x[first:stop].transpose(0, 1) for x in (q, k, v))
        seen = torch.ones(stop - first, stop - first, dtype=torch.bool).tril()
        seen = seen if window_size[0] < 0 else seen.triu(-window_size[0])
        part = torch.nn.functional.scaled_dot_product_attention(
            own, keys, values, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        )
        parts.append(part.transpose(0, 1))
    return torch.cat(parts)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the kernel where transformers looks for the real one: by the name in the model's config."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        flash_attn_varlen_func=varlen_attention, flash_attn_func=None, flash_attn_with_kvcache=None, __path__=[]
    )
    vars(padding).update(pad_input=flash_utils._pad_input, unpad_input=flash_utils._unpad_input)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
