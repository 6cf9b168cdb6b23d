"""The head on a pretend CUDA device: the numbers of float64, waits that do not grow, products of 16-bit matrices."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import fakecuda

from tokencredit.collect.head import gemm
from tokencredit.collect.head import objective as objective_module
from tokencredit.collect.head.divergence import head_divergence
from tokencredit.collect.head.frozen import FrozenHead
from tokencredit.collect.head.logprobs import RecomputedHead, head_logprobs
from tokencredit.collect.head.objective import head_objective
from tokencredit.collect.head.tiles import HeadInputs


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 x 512 in place of 4096 x 8192, and a machine that can pretend a device."""
    fakecuda.require()
    monkeypatch.setattr(gemm, "CUDA_TOKENS", 64)
    monkeypatch.setattr(gemm, "CUDA_WORKSPACE", 4 * 64 * 512 * 3)

    def differentiate(loss: Any, logprobs: torch.Tensor, entropies: torch.Tensor, rows: slice) -> tuple[Any, ...]:
        """Of the sum of both; the pretend device does not run autograd's engine."""
        return loss(logprobs, entropies, rows).sum(), torch.ones_like(logprobs), torch.ones_like(entropies)

    monkeypatch.setattr(objective_module, "_differentiate", differentiate)


def data(tokens: int, vocab: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, 16, generator=rng), torch.randn(vocab, 16, generator=rng)
    return [hidden.to(dtype), weight.to(dtype), torch.randint(0, vocab, (tokens,), generator=rng)]


class Context(SimpleNamespace):
    """What autograd hands to a function."""

    needs_input_grad = (True, True, False, False, False)

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, _: bool) -> None: ...

    def mark_non_differentiable(self, *_: torch.Tensor) -> None: ...


def recomputed(hidden: Any, weight: Any, targets: Any) -> list[Any]:
    context = Context()
    values = RecomputedHead.forward(context, *HeadInputs(hidden, weight, targets))
    ones = torch.ones_like(values[0])
    return [*values, *RecomputedHead.backward(context, ones, ones)[:2]]


def frozen(hidden: Any, weight: Any, targets: Any) -> list[Any]:
    context = Context()
    values = FrozenHead.forward(context, *HeadInputs(hidden, weight, targets))
    return [*values, FrozenHead.backward(context, torch.ones_like(values[0]))[0]]


def objective(hidden: Any, weight: Any, targets: Any) -> list[Any]:
    return list(head_objective(hidden, weight, targets, lambda logprobs, entropies, rows: logprobs + entropies))


def divergence(hidden: Any, weight: Any, targets: Any) -> list[Any]:
    return [head_divergence((hidden, weight), (hidden.flip(0), weight))]


def scored(hidden: Any, weight: Any, targets: Any) -> list[Any]:
    return list(head_logprobs(hidden, weight, targets))


ENGINES = [scored, recomputed, frozen, objective, divergence]


def on_device(engine: Any, parts: list[torch.Tensor]) -> tuple[list[torch.Tensor], fakecuda.Stats]:
    with fakecuda.session() as stats:
        values = engine(*fakecuda.cuda(parts))
    return fakecuda.cpu(values), stats


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_gives_the_numbers_of_float64(engine: Any, dtype: torch.dtype) -> None:
    parts = data(70, 1100, dtype)
    measured, _ = on_device(engine, parts)
    wanted = engine(*(part.double() for part in parts[:2]), parts[2])
    for one, other in zip(measured, wanted, strict=True):
        is_gradient = one.ndim == 2 and dtype == torch.bfloat16
        bound = 2e-2 if is_gradient else 1e-5
        assert float((one.double() - other).abs().max() / other.abs().max()) < bound


@pytest.mark.parametrize(
    ("engine", "waits"), [(scored, 0), (recomputed, 1), (frozen, 0), (objective, 0), (divergence, 0)]
)
def test_waits_do_not_grow_with_tokens_or_vocabulary(engine: Any, waits: int) -> None:
    for tokens, vocab in ((64, 512), (200, 512), (64, 2000)):
        _, stats = on_device(engine, data(tokens, vocab))
        assert stats.syncs == waits, stats.sync_at


def test_the_live_rows_cost_one_wait() -> None:
    hidden, weight, targets = data(130, 1100)
    live = torch.arange(130) % 3 == 0
    with fakecuda.session() as stats:
        parts = head_logprobs(*fakecuda.cuda([hidden, weight, targets]), live=fakecuda.cuda(live))
    assert stats.syncs == 1, stats.sync_at
    whole = head_logprobs(hidden, weight, targets)
    for one, other in zip(fakecuda.cpu(list(parts)), whole, strict=True):
        torch.testing.assert_close(one, torch.where(live, other, 0.0))


def test_tiles_on_the_device_are_few_and_large() -> None:
    hidden, weight, targets = data(128, 2048)
    with fakecuda.session() as stats:
        head_logprobs(*fakecuda.cuda([hidden, weight, targets]))
    assert stats.ops["mm"] == 8  # 2 blocks of tokens by 4 tiles of the vocabulary
    assert stats.kernels < 8 * 24 + 40


def test_16_bit_matrices_are_multiplied_as_they_are() -> None:
    hidden, weight, targets = data(70, 1100, torch.bfloat16)
    with fakecuda.session() as stats:
        recomputed(*fakecuda.cuda([hidden, weight, targets]))
    # 2 blocks of tokens by 3 tiles, forward, again in the backward, and two products of the gradient
    assert stats.ops["mm"] + stats.ops["addmm"] == 2 * 3 * 4


def test_a_hosts_autocast_rounds_the_matrices_and_nothing_else() -> None:
    hidden, weight, targets = data(70, 1100)
    with fakecuda.session():
        parts = fakecuda.cuda([hidden, weight, targets])
        with torch.autocast("cuda", dtype=torch.bfloat16):
            rounded = head_logprobs(*parts)
        wanted = head_logprobs(parts[0].bfloat16(), parts[1].bfloat16(), parts[2])
    for one, other in zip(fakecuda.cpu(list(rounded)), fakecuda.cpu(list(wanted)), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
