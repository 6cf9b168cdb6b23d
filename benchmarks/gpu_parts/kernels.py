"""Sections A to D: ceilings of the card, correctness, the head, statistics of attention rows."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gpu_parts.measure import Bench, Run, table, within
from tokencredit.collect.attention import fused as attention_fused
from tokencredit.collect.attention.rows import Visibility, head_entropies, row_statistics
from tokencredit.collect.head import fused as head_fused
from tokencredit.collect.head import gemm
from tokencredit.collect.head.divergence import head_divergence
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.head.objective import head_objective

ROOT = Path(__file__).parents[2]
LOOP = 200


def ceilings(bench: Bench) -> None:
    """A: what the card can do; everything later is read against it."""
    size, device = bench.size(8192, 128), bench.device
    half = [torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)]
    single = [part.float() for part in half]
    source = torch.empty(bench.size(1 << 31, 1 << 16), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    query, key, value = attention_inputs(bench, 8)
    small = torch.zeros(1, device=device)
    matmul = torch.backends.cuda.matmul
    found = bench.time(
        {
            "bf16 product": lambda: half[0] @ half[1],
            "fp32 product": within(matmul, lambda: single[0] @ single[1], allow_tf32=False),
            "fp32 product, TF32": within(matmul, lambda: single[0] @ single[1], allow_tf32=True),
            "copy": lambda: target.copy_(source),
            "flash attention": lambda: attend(query, key, value),
            f"{LOOP} launches": lambda: [small.add_(1.0) for _ in range(LOOP)],
            f"{LOOP} items": lambda: [small.item() for _ in range(LOOP)],
        }
    )
    flop = 2.0 * size**3 / 1e9
    rates = {name: flop / found[name].ms for name in ("bf16 product", "fp32 product", "fp32 product, TF32")}
    copied = 2 * source.numel() / 1e9 / found["copy"].ms
    bench.say(
        f"A  bf16 {rates['bf16 product']:.0f} TFLOP/s | fp32 {rates['fp32 product']:.0f} | TF32 "
        f"{rates['fp32 product, TF32']:.0f} | copy {copied:.2f} TB/s | flash attention "
        f"{found['flash attention'].ms:.2f} ms | launch {found[f'{LOOP} launches'].ms / LOOP * 1e3:.1f} µs | item "
        f"{found[f'{LOOP} items'].ms / LOOP * 1e3:.1f} µs"
    )
    bench.keep("A", dict(found))


def attention_inputs(bench: Bench, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values at the shape of a 1.7B model."""
    heads, keys, length, width = (16, 8, 4608, 128) if not bench.tiny else (4, 2, 48, 16)
    rows = bench.size(rows, 2)
    shape = {"device": bench.device, "dtype": torch.bfloat16 if bench.on_gpu else torch.float32}
    query = torch.randn(rows, heads, length, width, **shape)
    return query, torch.randn(rows, keys, length, width, **shape), torch.randn(rows, keys, length, width, **shape)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The layer's own attention, causal."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def correctness(bench: Bench) -> None:
    """B: the tests marked gpu, then kernels and head against float64 on the card."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done: Any = None
    try:
        done = subprocess.run(
            [*command, f"--junitxml={bench.out.resolve() / 'junit.xml'}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=min(90.0, max(10.0, bench.left() - 60)),
            check=False,
        )
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-120:]])[-1]
        (bench.out / "tests.log").write_text(done.stdout + done.stderr)
    except subprocess.TimeoutExpired:
        last = "cut off"
    bench.say(f"B  tests: {last} ({time.monotonic() - start:.0f} s)")
    bench.keep("B", {"tests": last})
    bench.keep("B", errors := {**_attention_errors(bench), **_head_errors(bench)})
    cells = [f"{name} {error}" for name, error in errors.items()]
    for first in range(0, len(cells), 2):
        bench.say("   " + " | ".join(cells[first : first + 2]))


def _attention_errors(bench: Bench) -> dict[str, str]:
    cases = [
        *((64, torch.bfloat16, 1000, "causal"), (128, torch.bfloat16, 4608, "causal")),
        *(
            (128, torch.bfloat16, 1000, "window"),
            (128, torch.bfloat16, 1000, "padding"),
            (128, torch.float32, 150, "causal"),
        ),
        (256, torch.bfloat16, 150, "causal"),
    ]
    errors = {}
    for width, dtype, length, kind in [(16, torch.float32, 40, "window")] if bench.tiny else cases:
        bench.check_time()
        query = torch.randn(2, 16, length, width, device=bench.device).to(dtype)
        key = torch.randn(2, 2, length, width, device=bench.device).to(dtype)
        seen, rows = _mask(kind, length, bench.device), slice(max(0, length - 200), length)
        largest = []
        for factor in (1, 4, 12):
            found = head_entropies(query * factor, key, seen, scale=width**-0.5, rows=rows)
            exact = _exact_entropies(query * factor, key, seen, width**-0.5, rows)
            largest.append(f"{float((found.double() - exact).abs().max()):.0e}")
        name = f"attention D {width} {str(dtype)[6:]} T {length} {kind}: |dH|, q × 1, 4, 12:"
        errors[name] = " ".join(largest)
    if bench.on_gpu and not bench.tiny and bench.left() > 60:
        errors["attention, more than 2³¹ elements: |dH|"] = _int64_error(bench)
    return errors


def _int64_error(bench: Bench) -> str:
    shape = {"device": bench.device, "dtype": torch.bfloat16}
    query, key = torch.randn(40, 16, 27000, 128, **shape), torch.randn(40, 2, 27000, 128, **shape)
    rows = slice(27000 - 64, 27000)
    found = head_entropies(query, key, Visibility(), scale=128**-0.5, rows=rows)[-1:]
    exact = _exact_entropies(query[-1:], key[-1:], Visibility(), 128**-0.5, rows)
    return f"{float((found.double() - exact).abs().max()):.0e}"


def _mask(kind: str, length: int, device: torch.device) -> Visibility:
    """A window of half the length, padding on the left of a third of it, or causal without a mask."""
    if kind == "causal":
        return Visibility()
    row, column = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    seen = (column <= row) & (column > row - length // 2 if kind == "window" else column >= length // 3)
    return Visibility(lambda _, rows: seen[rows])


def _exact_entropies(query: Tensor, key: Tensor, seen: Visibility, scale: float, rows: slice) -> Tensor:
    """In float64, one sequence at a time."""
    share, length = query.shape[1] // key.shape[1], key.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[rows]
    mask = causal if seen.mask is None else seen.mask(0, rows)
    found = []
    for left, right in zip(query, key, strict=True):
        scores = left[:, rows].double() @ right.double().repeat_interleave(share, 0).mT * scale
        probs = torch.softmax(scores.masked_fill(~mask, -1e300), -1).masked_fill(~mask, 0.0)
        found.append(torch.special.entr(probs).sum(-1))
    return torch.stack(found)


def _head_errors(bench: Bench) -> dict[str, str]:
    rows, width, vocab = 256, bench.size(1024, 32), bench.size(50_000, 300)
    hidden, weight = (torch.randn(count, width, device=bench.device) for count in (rows, vocab))
    hidden, targets = hidden * 0.3, torch.randint(0, vocab, (rows,), device=bench.device)
    errors = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        parts = [part.to(dtype).requires_grad_() for part in (hidden, weight)]
        exact = [part.detach().double().requires_grad_() for part in parts]
        results = []
        for pair in (parts, exact):
            values = head_logprobs(*pair, targets)
            results.append(
                [*(value.detach() for value in values), *torch.autograd.grad(values[0].sum() + values[1].sum(), pair)]
            )
        shares = [float((one - two).abs().max() / two.abs().max()) for one, two in zip(*results, strict=True)]
        errors[f"head {name}: relative error of log p, H, dh, dW:"] = " ".join(f"{share:.0e}" for share in shares)
    return errors


def head(bench: Bench) -> None:
    """C: scoring and training of the head against its floor, the products of one tile size."""
    tokens, width, vocab = (32_768, 2048, 151_936) if not bench.tiny else (64, 16, 300)
    shape = {"device": bench.device, "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, width, **shape).mul_(0.3).requires_grad_()
    weight = torch.randn(vocab, width, **shape).mul_(0.05).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=bench.device)
    few = (torch.rand(tokens, device=bench.device) < 0.2).float()
    room = torch.empty(4096, 32_768, **shape) if not bench.tiny else torch.empty(64, 300, **shape)

    @torch.no_grad()
    def floor() -> None:
        for block in range(0, tokens, 4096):
            for column in range(0, vocab, 32_768):
                left, right = hidden[block : block + 4096], weight[column : column + 32_768]
                torch.mm(left, right.T, out=room[: len(left), : len(right)])

    measured = bench.time({"floor: matrix products only": floor}, rounds=3)
    base = measured["floor: matrix products only"].ms
    bench.say(f"C  head, {tokens} × {width} × {vocab} bf16: one product {base:.2f} ms")
    frozen = weight.detach()
    score = torch.no_grad()(lambda: head_logprobs(hidden, weight, targets))
    both = lambda: sum(head_logprobs(hidden, weight, targets)).sum()  # noqa: E731
    large = {"CUDA_WORKSPACE": 3 * 4 * 4096 * 32_768}
    blocks = {"fits": lambda _: False}
    arms: dict[str, tuple[int, Run]] = {
        "score": (1, score),
        "score, tiles of 32768": (1, within(gemm, score, **large)),
        "score, without our kernels": (1, within(head_fused, score, **blocks)),
        "frozen": (2, _trained(lambda: head_logprobs(hidden, frozen, targets)[0].sum(), hidden)),
        "objective in forward": (
            3,
            _trained(lambda: head_objective(hidden, weight, targets, _loss)[0], hidden, weight),
        ),
        "recompute": (4, _trained(both, hidden, weight)),
        "recompute, without our kernels": (4, within(head_fused, _trained(both, hidden, weight), **blocks)),
        "recompute, 20 % live": (
            2,
            _trained(lambda: (head_logprobs(hidden, weight, targets)[0] * few).sum(), hidden, weight),
        ),
        "divergence": (2, torch.no_grad()(lambda: head_divergence((hidden, weight), (hidden.flip(0), weight)))),
        **_peers(hidden, weight, targets),
    }
    for name, (products, run) in arms.items():
        bench.check_time(10.0)
        timing = bench.time({name: run}, rounds=3, warm=2)
        table(bench, "C", timing, base * products, f"floor of {products}")


def _loss(logprobs: Tensor, entropies: Tensor, rows: slice) -> Tensor:
    return logprobs + 0.01 * entropies


def _trained(loss: Run, *leaves: Tensor) -> Run:
    return lambda: torch.autograd.grad(loss(), leaves)


def _peers(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, tuple[int, Run]]:
    """TRL's and Liger's heads where they are installed, and the naive one on a quarter of the tokens."""
    quarter = len(hidden) // 4

    def trl() -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        options = (1.0, 8192, None, 1.0, ("entropy",))
        return sum(ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[:2]).sum()

    def liger() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)

    def naive() -> Tensor:
        everything = torch.log_softmax((hidden[:quarter] @ weight.T).float(), -1)
        entropies = -(everything.exp() * everything).sum(-1)
        return (everything.gather(1, targets[:quarter, None])[:, 0] + entropies).sum()

    return {
        "TRL, score": (1, torch.no_grad()(trl)),
        "TRL, trained": (4, _trained(trl, hidden, weight)),
        "Liger, trained, no entropy": (3, _trained(liger, hidden, weight)),
        "naive, a quarter of the tokens": (3, _trained(naive, hidden, weight)),
    }


def attention(bench: Bench) -> None:
    """D: statistics of attention rows against the layer's own attention."""
    query, key, value = attention_inputs(bench, 8)
    length = query.shape[2]
    rows = slice(length - bench.size(4096, 32), length)
    scale = query.shape[-1] ** -0.5
    mask = torch.ones(length, length, dtype=torch.bool, device=bench.device).tril()
    masked = Visibility(lambda _, part: mask[part])
    mean = lambda seen=Visibility(): row_statistics(query, key, seen, scale=scale, rows=rows)  # noqa: E731,B008
    each = lambda: head_entropies(query, key, Visibility(), scale=scale, rows=rows)  # noqa: E731
    blocks = {"fits": lambda *_: False}
    found = bench.time(
        {
            "flash attention": lambda: attend(query, key, value),
            "head mean": mean,
            "every head": each,
            "head mean, a mask": lambda: mean(masked),
            "head mean, blocks": within(attention_fused, mean, **blocks),
            "every head, blocks": within(attention_fused, each, **blocks),
        },
        rounds=3,
    )
    bench.say(f"D  attention rows, {len(query)} sequences of {length}")
    table(bench, "D", found, found["flash attention"].ms, "flash")
