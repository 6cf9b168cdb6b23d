"""Attention entropies of real small models against `output_attentions` of eager attention."""

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tokencredit.collect.attention.entropies import (
    attention_entropies,
    attention_layers,
    middle_layer,
    probe_attention,
    tap_spans,
    visibility_of,
)
from tokencredit.collect.attention.rhythms import attention_rhythms
from tokencredit.errors import TokenCreditError

BATCH, TOTAL, PROMPT = 3, 40, 14
SIZE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "mistral with a window": ("Mistral", {"sliding_window": 9}),
    "gemma2 with soft-caps and windows": (
        "Gemma2",
        {"sliding_window": 9, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3, one full layer in six": ("Gemma3", {"sliding_window": 9}),
    "gpt_oss with learned sinks": ("GptOss", {"sliding_window": 9, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


def build(name: str) -> Any:
    family, options = MODELS[name]
    torch.manual_seed(7)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**SIZE | options))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "q_proj.weight" in parameter_name or "k_proj.weight" in parameter_name:
                parameter.mul_(40.0)  # sharp attention: flat rows would hide errors
            elif "q_norm.weight" in parameter_name:
                parameter.add_(3.0)
            elif "sinks" in parameter_name:
                parameter.normal_()
    return model


def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (BATCH, TOTAL), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> torch.Tensor | None:
    if side == "none":
        return None
    mask = torch.ones(BATCH, TOTAL, dtype=torch.long)
    mask[1, slice(0, 6) if side == "left" else slice(-6, None)] = 0
    return mask


@torch.no_grad()
def eager_maps(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, layer: int) -> torch.Tensor:
    before, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    maps = model(ids, attention_mask=mask, output_attentions=True).attentions[layer].double()
    model.set_attn_implementation(before)
    model.train(training)
    return maps / maps.sum(-1, keepdim=True).clamp_min(1e-30)  # learned sinks leave less than one


def entropy_of(maps: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(maps).sum(-1) / seen.sum(-1).clamp_min(2).log()


def visible(model: Any, layer: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Who sees whom by hand: causal, window, padding."""
    kinds = getattr(model.config, "layer_types", None)
    window = getattr(model.config, "sliding_window", None)
    sliding = window is not None and (kinds is None or kinds[layer] == "sliding_attention")
    seen = torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril()
    seen = seen & ~seen.tril(-window) if sliding else seen
    return seen.expand(BATCH, -1, -1) if mask is None else seen & mask[:, None].bool()


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_eager_attention(name: str, side: str) -> None:
    model, ids, mask = build(name), tokens(), padding(side)
    for layer in (0, middle_layer(model), 3):
        maps = eager_maps(model, ids, mask, layer)
        seen = visible(model, layer, mask)
        found = attention_entropies(model, ids, mask, PROMPT, TOTAL - PROMPT, layer=layer)
        wanted = entropy_of(maps.mean(1), seen)[:, PROMPT - 1 : -1]
        real = slice(None) if mask is None else mask[:, PROMPT - 1 : -1].bool()
        assert 0.05 < float(wanted.mean()) < 0.995  # soft-caps and windows keep rows flat
        assert float((found - wanted)[real].abs().max()) < 2e-6
        heads = attention_entropies(model, ids, mask, PROMPT, TOTAL - PROMPT, layer=layer, heads="mean_entropy")
        wanted = entropy_of(maps, seen[:, None]).mean(1)[:, PROMPT - 1 : -1]
        assert float((heads - wanted)[real].abs().max()) < 1e-5


def test_own_rows_are_one_later() -> None:
    model, ids = build("llama"), tokens()
    own = attention_entropies(model, ids, None, PROMPT, TOTAL - PROMPT - 1, row="own")
    predicting = attention_entropies(model, ids, None, PROMPT + 1, TOTAL - PROMPT - 1)
    assert torch.equal(own, predicting)


def test_packed_sequences_are_sequences_of_their_own() -> None:
    model = build("qwen3")
    ids = tokens()[:2, :15]
    packed = ids.reshape(1, 30)
    places = torch.arange(15).repeat(2)[None]
    found = attention_entropies(model, packed, None, 1, 29, row="predicting", position_ids=places)
    alone = attention_entropies(model, ids, None, 1, 14)
    torch.testing.assert_close(found[0, :14], alone[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(found[0, 15:29], alone[1], rtol=0, atol=2e-6)


def test_layers_are_averaged_and_stopping_early_changes_nothing() -> None:
    model, ids = build("qwen3"), tokens()
    ran: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: ran.append(index))
    both = attention_entropies(model, ids, None, PROMPT, 20, layer=[0, 1])
    assert ran == [0]  # layer 1 was left in the middle, 2 and 3 never began
    parts = [attention_entropies(model, ids, None, PROMPT, 20, layer=i, stop_early=False) for i in (0, 1)]
    assert ran[1:] == [0, 1, 2, 3] * 2
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)


def test_the_model_is_left_as_it_was() -> None:
    model, ids = build("gemma2 with soft-caps and windows"), tokens()
    model.train()
    model.model.layers[1].eval()
    implementation = model.config._attn_implementation
    attention_entropies(model, ids, None, PROMPT, 20)
    assert model.config._attn_implementation == implementation == "eager"
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    with pytest.raises(RuntimeError), probe_attention(model, [1], lambda *args: None):
        raise RuntimeError
    assert model.config._attn_implementation == "eager"


def gradients(model: nn.Module, ids: torch.Tensor, probed: bool) -> list[torch.Tensor]:
    model.zero_grad()
    if probed:
        with probe_attention(model, [2], lambda seen: seen.query.shape) as probe:
            with torch.no_grad():
                model(ids)
            loss = model(ids, labels=ids).loss
            loss.backward()
        assert probe.found == {2: [torch.Size([BATCH, 8, TOTAL, 8])]}  # measured once, where gradients were off
    else:
        model(ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_inside_the_probe_are_bit_identical(checkpointing: bool) -> None:
    model, ids = build("qwen3"), tokens()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    plain, probed = gradients(model, ids, False), gradients(model, ids, True)
    assert len(plain) > 20
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))


def test_middle_layers() -> None:
    assert middle_layer(build("qwen3")) == 2
    assert middle_layer(build("mistral with a window")) == 2  # every layer slides: the nearest of any kind
    gemma = build("gemma2 with soft-caps and windows")
    assert gemma.config.layer_types[2] == "sliding_attention"
    assert middle_layer(gemma) == 1  # full attention before sliding
    assert list(attention_layers(gemma)) == [0, 1, 2, 3]


def test_refusals_name_what_is_possible() -> None:
    model, ids = build("qwen3"), tokens()
    with pytest.raises(TokenCreditError, match=r"layer 9 .* \[0, 1, 2, 3\]"):
        attention_entropies(model, ids, None, PROMPT, 20, layer=9)
    with pytest.raises(TokenCreditError, match="do not fit"):
        attention_entropies(model, ids, None, 0, 20)
    with pytest.raises(TokenCreditError, match="no attention was seen"), probe_attention(model, [1], print):
        model(ids)  # gradients are on: nothing is measured, and that is said
    with pytest.raises(TokenCreditError, match="no attention layers whose rows can be read"):
        attention_layers(nn.Linear(2, 2))
    with pytest.raises(TokenCreditError, match="cannot read the mask"):
        visibility_of(object(), 4, 4, "flex_attention", {})  # type: ignore[arg-type]


def test_lengths_and_windows_of_a_flash_kernel() -> None:
    seen = visibility_of(None, 4, 4, "flash_attention_2", {"sliding_window": 2})
    assert seen.mask is not None
    assert seen.mask(0, slice(2, 4)).tolist() == [[False, True, True, False], [False, False, True, True]]
    padded = visibility_of(torch.tensor([[0, 1, 1, 1]]), 4, 4, "flash_attention_2", {})
    assert padded.mask is not None
    assert padded.mask(0, slice(0, 3)).tolist() == [
        [False] * 4,
        [False, True, False, False],
        [False, True, True, False],
    ]
    packed = visibility_of(None, 4, 4, "flash_attention_2", {"cu_seq_lens_q": torch.tensor([0, 2, 4])})
    assert packed.mask is not None
    assert packed.mask(0, slice(2, 4)).tolist() == [[False, False, True, False], [False, False, True, True]]
    assert visibility_of(None, 4, 4, "sdpa", {"sliding_window": 2}).mask is None  # the sdpa mask holds the window


def test_rhythms_average_the_local_and_the_far_heads() -> None:
    model, ids, mask = build("qwen3"), tokens(), padding("left")
    distances, influences = attention_rhythms(model, ids, mask, PROMPT, TOTAL - PROMPT, layers=[1, 2])
    maps = torch.cat([eager_maps(model, ids, mask, layer) for layer in (1, 2)], dim=1)
    back = (torch.arange(TOTAL)[:, None] - torch.arange(TOTAL)[None]).clamp_min(0)
    order = (maps * back).sum(-1)[:, :, PROMPT:].mean((0, 2)).argsort()
    local = (maps[:, order[:5]].mean(1) * back.clamp_max(10)).sum(-1)  # 30 % of 16 heads is 5
    torch.testing.assert_close(distances.double(), local[:, PROMPT:], rtol=1e-5, atol=1e-5)
    far = maps[:, order[-5:]].mean(1)
    torch.testing.assert_close(
        influences[:, 2].double(), far[:, PROMPT + 12 :, PROMPT + 2].mean(1), rtol=1e-5, atol=1e-6
    )
    assert influences[:, -10:].abs().max() == 0.0


@pytest.mark.parametrize("name", ["qwen3", "mistral with a window", "gemma2 with soft-caps and windows"])
@pytest.mark.parametrize("options", [{}, {"row": "own", "layer": [0, 2]}, {"heads": "mean_entropy", "drop_sink": 1}])
def test_spans_of_packed_and_of_padded_rows(name: str, options: dict[str, Any]) -> None:
    model = build(name)
    rows = [torch.randint(3, 60, (length,)) for length in (12, 17, 5)]
    edges = [0, 12, 29, 34]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    passes = {
        "packed": (
            [(0, a, b) for a, b in pairwise(edges)],
            {"input_ids": torch.cat(rows)[None], "position_ids": places},
        ),
        "padded": ([(i, 0, len(row)) for i, row in enumerate(rows)], {"input_ids": padded, "attention_mask": seen}),
    }
    for spans, inputs in passes.values():
        with torch.no_grad(), tap_spans(model, spans, **options) as found:
            model(**inputs, use_cache=False)
        (flat,) = found
        for row, (first, stop) in zip(rows, pairwise(edges), strict=True):
            wanted = attention_entropies(model, row[None], None, 2, len(row) - 2, **options)[0]
            torch.testing.assert_close(flat[first:stop][1:-1], wanted, atol=2e-6, rtol=1e-5)
