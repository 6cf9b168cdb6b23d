"""The tiled head against float64 logits: values, gradients, digits of confident tokens, row compaction, engines."""

import math
from collections.abc import Callable

import pytest
import torch

from tokencredit.collect.head import gemm as head_gemm
from tokencredit.collect.head import logprobs as head_module
from tokencredit.collect.head.divergence import head_divergence
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.head.objective import head_objective
from tokencredit.collect.head.tiles import PLAIN, Readout
from tokencredit.errors import TokenCreditError

TOKENS, WIDTH, VOCAB = 37, 48, 4999  # three tiles, the last one short
READOUTS = [PLAIN, Readout(temperature=0.7), Readout(temperature=1.3, scale=0.5, softcap=3.0)]


def logits64(hidden: torch.Tensor, weight: torch.Tensor, readout: Readout) -> torch.Tensor:
    raw = hidden.double() @ weight.double().T * readout.scale
    capped = raw if readout.softcap is None else readout.softcap * torch.tanh(raw / readout.softcap)
    return capped / readout.temperature


def oracle(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, readout: Readout
) -> tuple[torch.Tensor, torch.Tensor]:
    everything = torch.log_softmax(logits64(hidden, weight, readout), -1)
    return everything.gather(1, targets[:, None])[:, 0], -(everything.exp() * everything).sum(-1)


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(TOKENS, WIDTH, generator=g),
        "weight": torch.randn(VOCAB, WIDTH, generator=g) * 0.5,
        "targets": torch.randint(0, VOCAB, (TOKENS,), generator=g),
        "a": torch.randn(TOKENS, generator=g) * (torch.rand(TOKENS, generator=g) < 0.6),
        "b": torch.randn(TOKENS, generator=g),
    }


def gradients(
    function: Callable[..., tuple[torch.Tensor, ...]], data: dict[str, torch.Tensor], dtype: torch.dtype, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = (data[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    logprobs, entropies = function(hidden, weight)
    loss = (logprobs * data["a"]).sum()
    if entropy:
        loss = loss + (entropies * data["b"]).sum()
    return torch.autograd.grad(loss, (hidden, weight))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("entropy", [False, True])
def test_recompute_equals_float64(readout: Readout, entropy: bool) -> None:
    data = inputs()
    targets = data["targets"]
    ours = head_logprobs(data["hidden"], data["weight"], targets, readout=readout)
    for found, wanted in zip(ours, oracle(data["hidden"], data["weight"], targets, readout), strict=True):
        assert relative(found, wanted) < 1e-5
    found = gradients(lambda h, w: head_logprobs(h, w, targets, readout=readout), data, torch.float32, entropy)
    wanted = gradients(lambda h, w: oracle(h, w, targets, readout), data, torch.float64, entropy)
    assert all(relative(f, w) < 1e-5 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("readout", READOUTS)
def test_frozen_head_equals_float64(readout: Readout) -> None:
    data = inputs(1)
    targets = data["targets"]
    hidden = data["hidden"].clone().requires_grad_()
    logprobs, entropies = head_logprobs(hidden, data["weight"], targets, readout=readout)
    assert not entropies.requires_grad
    (found,) = torch.autograd.grad((logprobs * data["a"]).sum(), hidden)
    wanted = gradients(lambda h, w: oracle(h, w, targets, readout), data, torch.float64, False)[0]
    assert relative(found, wanted) < 1e-5
    assert relative(entropies, oracle(data["hidden"], data["weight"], targets, readout)[1]) < 1e-5


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("entropy", [False, True])
def test_objective_in_forward_equals_float64(readout: Readout, entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokencredit.collect.head.objective.BLOCK", 16)
    data = inputs(2)
    a, b = data["a"], data["b"] * (data["a"] != 0) * entropy
    hidden, weight = (data[name].clone().requires_grad_() for name in ("hidden", "weight"))

    def loss(logprobs: torch.Tensor, entropies: torch.Tensor, rows: slice) -> torch.Tensor:
        return logprobs * a[rows] + entropies * b[rows] if entropy else logprobs * a[rows]

    total, _, _ = head_objective(hidden, weight, data["targets"], loss, readout=readout)
    found = torch.autograd.grad(3.0 * total, (hidden, weight))
    data["b"] = b
    wanted = gradients(lambda h, w: oracle(h, w, data["targets"], readout), data, torch.float64, entropy)
    assert all(relative(f, 3.0 * w) < 1e-5 for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("gap", [5.0, 15.0, 25.0, 27.0])
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_confident_tokens_keep_their_digits(gap: float, offset: float) -> None:
    # Logits are the hidden state itself (the head is the identity), so that float32 logits are exact on both sides.
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(16, 2500, generator=g) * 0.5 + offset
    targets = torch.randint(0, 2500, (16,), generator=g)
    logits[torch.arange(16), targets] = offset + gap
    found = head_logprobs(logits, torch.eye(2500), targets)
    wanted = oracle(logits, torch.eye(2500), targets, PLAIN)
    # −log p ≈ 2499 e^{σ²/2 − gap}: 5e-9 at 27, below which float64's log-softmax is no oracle
    assert 0.5 < float(-wanted[0].mean()) / math.log1p(2499 * math.exp(0.125 - gap)) < 2.0
    for ours, theirs in zip(found, wanted, strict=True):
        assert float(((ours.double() - theirs) / theirs).abs().max()) < 1e-5


def test_rows_without_gradient_cost_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    data = inputs()
    rows: list[int] = []
    original = head_module.tile_logits

    def watched(hidden: torch.Tensor, *args: object) -> torch.Tensor:
        rows.append(hidden.shape[0])
        return original(hidden, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(head_module, "tile_logits", watched)
    gradients(lambda h, w: head_logprobs(h, w, data["targets"]), data, torch.float32, False)
    assert set(rows) == {int((data["a"] != 0).sum())}


def test_live_rows_alone_are_computed() -> None:
    data = inputs()
    live = data["a"] != 0
    whole = head_logprobs(data["hidden"], data["weight"], data["targets"])
    part = head_logprobs(data["hidden"], data["weight"], data["targets"], live=live)
    for found, wanted in zip(part, whole, strict=True):
        torch.testing.assert_close(found, torch.where(live, wanted, 0.0))
    found_g = gradients(lambda h, w: head_logprobs(h, w, data["targets"], live=live), data, torch.float32, False)
    wanted_g = gradients(lambda h, w: oracle(h, w, data["targets"], PLAIN), data, torch.float64, False)
    assert all(relative(f, w) < 1e-5 for f, w in zip(found_g, wanted_g, strict=True))


def test_no_tokens_and_one_word() -> None:
    empty = torch.empty(0, WIDTH, requires_grad=True)
    weight = inputs()["weight"].requires_grad_()
    logprobs, entropies = head_logprobs(empty, weight, torch.empty(0, dtype=torch.long))
    (logprobs.sum() + entropies.sum()).backward()
    assert empty.grad is not None and empty.grad.shape == (0, WIDTH)
    alone = head_logprobs(torch.randn(3, 4), torch.randn(1, 4), torch.zeros(3, dtype=torch.long))
    assert alone[0].tolist() == [0.0] * 3 and alone[1].tolist() == [0.0] * 3


def test_float64_and_bfloat16_inputs() -> None:
    data = inputs()
    wide = head_logprobs(data["hidden"].double(), data["weight"].double(), data["targets"])
    assert wide[0].dtype == torch.float64
    assert relative(wide[1], oracle(data["hidden"], data["weight"], data["targets"], PLAIN)[1]) < 1e-12
    half = [data["hidden"].bfloat16(), data["weight"].bfloat16()]
    found = head_logprobs(half[0], half[1], data["targets"])
    for ours, theirs in zip(found, oracle(half[0], half[1], data["targets"], PLAIN), strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, theirs) < 1e-5  # logits are float32 whatever the inputs are


def test_onednn_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = inputs()
    plain = gradients(lambda h, w: head_logprobs(h, w, data["targets"], onednn=False), data, torch.float32, True)
    dnn = gradients(lambda h, w: head_logprobs(h, w, data["targets"], onednn=True), data, torch.float32, True)
    assert all(relative(f, w.double()) < 1e-5 for f, w in zip(dnn, plain, strict=True))
    head_gemm.onednn_available.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert head_gemm.onednn_available()  # detected by trying it
    head_gemm.onednn_available.cache_clear()
    monkeypatch.setattr(head_gemm, "_onednn", lambda left, right: left @ right.T * 1.01)
    assert not head_gemm.onednn_available()  # and by what it says
    head_gemm.onednn_available.cache_clear()


def test_the_frozen_engine_refuses_a_head_that_trains() -> None:
    data = inputs()
    with pytest.raises(TokenCreditError, match="frozen"):
        head_logprobs(data["hidden"], data["weight"].requires_grad_(), data["targets"], engine="frozen")


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("readout", READOUTS)
def test_divergence_equals_float64(direction: str, readout: Readout) -> None:
    data, g = inputs(4), torch.Generator().manual_seed(9)
    teacher = (torch.randn(TOKENS, 64, generator=g), torch.randn(VOCAB, 64, generator=g) * 0.4)
    q = torch.log_softmax(logits64(*teacher, PLAIN), -1)

    def exact(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = torch.log_softmax(logits64(hidden, weight, readout), -1)
        kl = (p.exp() * (p - q)).sum(-1) if direction == "reverse" else (q.exp() * (q - p)).sum(-1)
        return kl, kl

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kl = head_divergence((hidden, weight), teacher, direction=direction, student_readout=readout)
        return kl, kl

    assert relative(ours(data["hidden"], data["weight"])[0], exact(data["hidden"], data["weight"])[0]) < 1e-5
    found = gradients(ours, data, torch.float32, False)
    wanted = gradients(exact, data, torch.float64, False)
    assert all(relative(f, w) < 1e-5 for f, w in zip(found, wanted, strict=True))


def test_bfloat16_gradients_are_rounded_once() -> None:
    data = inputs()
    data |= {name: data[name].bfloat16() for name in ("hidden", "weight")}
    targets = data["targets"]
    found = gradients(lambda h, w: head_logprobs(h, w, targets), data, torch.bfloat16, True)
    wanted = gradients(lambda h, w: oracle(h, w, targets, PLAIN), data, torch.float64, True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative(ours, theirs) < 2**-8  # half a unit of bfloat16's last place, at the greatest entry
