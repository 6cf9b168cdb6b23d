"""Attention entropies in a pass of a host: under autocast, and where a flash kernel is at work."""

from itertools import pairwise
from typing import Any

import flash_kernel
import pytest
import torch
import transformers

from tokencredit.collect.attention.entropies import attention_entropies, tap_entropies, tap_spans, visibility_of

ROWS = (9, 14, 5)


def build(**options: Any) -> Any:
    torch.manual_seed(3)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    config = transformers.Qwen3Config(vocab_size=60, hidden_size=32, intermediate_size=48, **heads | options)
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name:
                parameter.add_(2.0)  # sharp attention: flat rows would hide errors
    return model


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_kernel.install(monkeypatch)


@pytest.mark.parametrize("window", [{}, {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_flash_attention_is_tapped_like_any_other(flash: None, window: dict[str, Any], layout: str) -> None:
    model = build(**window)
    rows = [torch.randint(3, 60, (length,)) for length in ROWS]
    wanted = [attention_entropies(model, row[None], None, 2, len(row) - 2)[0] for row in rows]
    edges = [0, 9, 23, 28]
    if layout == "packed":
        spans = [(0, first, stop) for first, stop in pairwise(edges)]
        places = torch.cat([torch.arange(length) for length in ROWS])[None]
        inputs = {"input_ids": torch.cat(rows)[None], "position_ids": places}
    else:
        spans = [(index, 0, length) for index, length in enumerate(ROWS)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        inputs = {"input_ids": padded, "attention_mask": (torch.arange(14) < torch.tensor(ROWS)[:, None]).long()}
    model.config._attn_implementation = "flash_attention_2"
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
        with tap_spans(model, spans) as found:
            tapped = model(**inputs, use_cache=False).logits
    assert torch.equal(tapped, plain)
    assert model.config._attn_implementation == "flash_attention_2"
    for (first, stop), row in zip(pairwise(edges), wanted, strict=True):
        torch.testing.assert_close(found[0][first:stop][1:-1], row, atol=2e-6, rtol=1e-5)


def test_a_window_alone_lies_where_the_queries_lie() -> None:
    device = torch.device("meta")  # there is one on every machine
    seen = visibility_of(None, 4, 4, "flash_attention_2", {"sliding_window": 2}, device=device)
    assert seen.mask is not None
    assert seen.mask(0, slice(0, 4)).device == device


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", ["mean_rows", "mean_entropy"])
def test_autocast_does_not_round_scores(rows: int, heads: Any) -> None:
    model = build().bfloat16()  # its queries and keys are the same with autocast and without
    ids = torch.randint(3, 60, (rows, 20))
    with torch.no_grad():
        with tap_entropies(model, 12, heads=heads) as plain:
            model(ids, use_cache=False)
        with tap_entropies(model, 12, heads=heads) as cast, torch.autocast("cpu", torch.bfloat16):
            model(ids, use_cache=False)
    torch.testing.assert_close(cast[0], plain[0], atol=1e-6, rtol=1e-6)
