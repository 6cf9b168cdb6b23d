"""Head, attention, scoring passes and samplers on a real GPU, against float64 or the CPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tokencredit.collect.adapter_residual import reference_logprobs
from tokencredit.collect.attention import fused as attention_fused
from tokencredit.collect.attention.entropies import attention_entropies
from tokencredit.collect.attention.parts import Visibility, softmax_in_place
from tokencredit.collect.attention.rows import head_entropies, row_statistics
from tokencredit.collect.exact.gradient import score_gradients
from tokencredit.collect.exact.score import score_trie
from tokencredit.collect.exact.trie import build_trie
from tokencredit.collect.head import fused as head_fused
from tokencredit.collect.head.divergence import head_divergence
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.head.tiles import PLAIN, Readout
from tokencredit.collect.logprobs import token_logprobs
from tokencredit.lab.sampler import sample
from tokencredit.seeds import generator

PROMPTS, EOS = [[2, 3, 4], [5, 4, 3]], 1
READOUTS = [PLAIN, Readout(temperature=1.3, scale=0.5, softcap=3.0)]


@pytest.fixture(params=["kernels", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(head_fused, "fits", lambda *_: False)
        monkeypatch.setattr(attention_fused, "fits", lambda *_: False)
    return str(request.param)


def head_parts(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(150, 64, generator=rng), torch.randn(20_001, 64, generator=rng) * 0.5
    targets = torch.randint(0, 20_001, (150,), generator=rng)
    weight[targets[0]] = hidden[0] * 0.4  # a confident token
    return hidden.to("cuda", dtype), weight.to("cuda", dtype), targets.cuda()


def gradients(hidden: Any, weight: Any, targets: Any, readout: Readout) -> list[torch.Tensor]:
    leaves = [part.detach().requires_grad_() for part in (hidden, weight)]
    values = head_logprobs(*leaves, targets, readout=readout)
    return [
        *(value.detach() for value in values),
        *torch.autograd.grad(values[0].sum() + 0.1 * values[1].sum(), leaves),
    ]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("readout", READOUTS)
def test_the_head_gives_the_numbers_of_float64(dtype: torch.dtype, readout: Readout) -> None:
    hidden, weight, targets = head_parts(dtype)
    found = gradients(hidden, weight, targets, readout)
    wanted = gradients(hidden.double(), weight.double(), targets, readout)
    for index, (one, two) in enumerate(zip(found, wanted, strict=True)):
        bound = 2e-2 if index > 1 and dtype == torch.bfloat16 else 1e-5
        assert float((one.double() - two).abs().max() / two.abs().max()) < bound


@pytest.mark.usefixtures("engine")
def test_autocast_rounds_the_matrices_and_nothing_else() -> None:
    hidden, weight, targets = head_parts(torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = head_logprobs(hidden, weight, targets)
    wanted = head_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_the_divergence_gives_the_numbers_of_float64() -> None:
    hidden, weight, _ = head_parts(torch.float32)
    found = head_divergence((hidden, weight), (hidden.flip(0), weight))
    wanted = head_divergence((hidden.double(), weight.double()), (hidden.flip(0).double(), weight.double()))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [7, 300, 4097, 70_000])
def test_a_softmax_over_its_input(width: int) -> None:
    scores = torch.randn(3, width, device="cuda")
    torch.testing.assert_close(softmax_in_place(scores.clone()), torch.softmax(scores, -1))


def masks(length: int) -> Iterator[tuple[str, torch.Tensor | None]]:
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    place = torch.arange(length)
    yield "causal", None
    yield "window", causal & ~causal.tril(-20)
    yield "padding on the left", causal & (place >= 19)
    yield "padding on the right", causal & (place < 50)
    yield "two packed sequences", causal & ((place[:, None] < 30) == (place < 30))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("name", "mask"), list(masks(70)))
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 64), (torch.bfloat16, 80), (torch.float32, 128)])
def test_attention_rows_are_those_of_the_cpu(name: str, mask: Any, dtype: torch.dtype, width: int) -> None:
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 70, width, generator=rng).to(dtype)
    key = torch.randn(2, 2, 70, width, generator=rng).to(dtype)
    found = []
    for device in ("cuda", "cpu"):
        plane = None if mask is None else mask.to(device)
        seen = Visibility() if plane is None else Visibility(lambda _, rows, plane=plane: plane[rows])
        parts = (query.to(device), key.to(device), seen)
        options = {"scale": width**-0.5, "rows": slice(11, 68)}
        found.append([head_entropies(*parts, **options), *row_statistics(*parts, **options)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=1e-4, atol=1e-4)


def tiny_model(attention: str = "sdpa") -> Qwen3ForCausalLM:
    shape = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(
        **shape, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=EOS
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scoring_passes_give_the_numbers_of_the_cpu(attention: str) -> None:
    ids = torch.tensor([[2, 3, 4, 5, 6, 1], [5, 4, 3, 2, 7, 1]])
    found = []
    for device in ("cuda", "cpu"):
        model, span = tiny_model(attention).to(device), (ids.to(device), torch.ones_like(ids).to(device), 3, 3)
        found.append([*token_logprobs(model, *span), attention_entropies(model, *span)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=1e-4, atol=1e-5)


def test_reference_log_probs_of_a_fresh_adapter_are_those_of_the_policy() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear")).cuda()
    ids = torch.tensor([[2, 3, 4, 5, 6, 1]], device="cuda")
    span = (ids, torch.ones_like(ids), 3, 3)
    assert torch.equal(reference_logprobs(model, *span), token_logprobs(model, *span)[0])


def test_tries_are_scored_and_differentiated_as_on_the_cpu() -> None:
    trie = build_trie([[[2, 3, EOS], [2, 4, EOS]]])
    weights = torch.ones(1, len(trie.spans[0]))
    found = []
    for device in ("cuda", "cpu"):
        model = tiny_model().to(device)
        scores = score_trie(model, [PROMPTS[0]], trie)
        found.append([*scores, score_gradients(model, PROMPTS[0], trie, 0, weights).cpu()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_sampler_of_the_lab_draws_what_generate_would() -> None:
    model, ids = tiny_model().cuda(), torch.tensor(PROMPTS, device="cuda")
    seen = torch.ones_like(ids)
    options = {"max_new_tokens": 5, "eos_token_id": EOS, "generator": generator("test"), "num_return": 1}
    drawn = sample(model, ids, seen, **options)
    logprobs = token_logprobs(
        model, torch.cat((ids, drawn.ids), 1), torch.cat((seen, drawn.mask.long()), 1), 3, drawn.ids.shape[1]
    )
    kept = drawn.mask.bool()
    torch.testing.assert_close(drawn.logprobs[kept], logprobs[0][kept], rtol=1e-4, atol=1e-4)
