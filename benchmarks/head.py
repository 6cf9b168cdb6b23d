"""Log-prob, entropy and divergence from hidden states: ours, the naive logits and TRL's functions, side by side.

One thread, CPU time of the thread, the variants interleaved round by round with a matrix product of the same size:
`GEMM` is what one product token × hidden × vocab costs. Workspace is the peak of resident memory above inputs and
gradients. verl's fused head, as it runs without Liger and flash-attn, takes part where verl is installed: with
`.venv-verl/bin/python`, which `make verl` sets up.

    python benchmarks/head.py
    python benchmarks/head.py --vocab 151936 --tokens 256 --rounds 3
    python benchmarks/head.py --part memory --tokens 4096 --vocab 32768 --hidden 64
    python benchmarks/head.py --part memory --tokens 4096 --vocab 151936 --hidden 64 --families 1
    .venv-verl/bin/python benchmarks/head.py --families 3
    python benchmarks/head.py --part digits
"""

import argparse
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from tokencredit.collect.head.divergence import head_divergence
from tokencredit.collect.head.gemm import onednn_available
from tokencredit.collect.head.logprobs import head_logprobs
from tokencredit.collect.head.objective import head_objective
from tokencredit.progress import track

try:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
except ImportError:
    FusedLinearForPPO = None

Run = Callable[[], Tensor]
SELECTED = 0.2  # share of the tokens that carry gradient, in the rows that say so
BONUS = 0.01  # entropy coefficient, in the rows that differentiate the entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["time", "memory", "digits"], default="time")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--families", type=int, default=4, help="how many of the tables, from the first")
    parser.add_argument("--only", default="", help="variants whose names hold this text, besides the first of a table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "digits":
        digits()
        return
    torch.manual_seed(0)
    print(f"tokens {args.tokens}, hidden {args.hidden}, vocab {args.vocab}, torch {torch.__version__}, one thread")
    product = "oneDNN" if onednn_available() else "torch"
    print(f"CPU {torch.backends.cpu.get_cpu_capability()}, products by {product}")
    families = dict(list(setting(args.tokens, args.hidden, args.vocab).items())[: args.families])
    for title, variants in families.items():
        first = next(iter(variants))
        families[title] = {name: run for name, run in variants.items() if name == first or args.only in name}
    if args.part == "memory":
        memory(families)
    else:
        times(families, args)


def setting(tokens: int, hidden: int, vocab: int) -> dict[str, dict[str, Run]]:
    """Families of variants that compute the same; the first of each is the one the others are compared with."""
    h = torch.randn(tokens, hidden).requires_grad_()
    w = (torch.randn(vocab, hidden) * 0.06).requires_grad_()
    frozen, targets = w.detach(), torch.randint(0, vocab, (tokens,))
    a = torch.randn(tokens)
    few = torch.where(torch.arange(tokens) % round(1 / SELECTED) == 0, a, 0.0)

    def chunked(weight: Tensor, outputs: tuple[str, ...] = ("entropy",)) -> tuple[Tensor, Tensor]:
        return ChunkedLogProbFunction.apply(h, weight, None, targets, 1.0, 8192, None, 1.0, outputs)[:2]

    def naive(weight: Tensor) -> tuple[Tensor, Tensor]:
        everything = torch.log_softmax(h @ weight.T, -1)
        return everything.gather(1, targets[:, None])[:, 0], -(everything.exp() * everything).sum(-1)

    def from_logits() -> tuple[Tensor, Tensor]:
        logits = h @ w.T
        return selective_log_softmax(logits, targets), entropy_from_logits(logits)

    def both(pair: tuple[Tensor, Tensor]) -> Tensor:
        return (pair[0] * a).sum() + BONUS * pair[1].sum()

    def first(pair: tuple[Tensor, Tensor], weights: Tensor = a) -> Tensor:
        return (pair[0] * weights).sum()

    def verl(weight: Tensor) -> tuple[Tensor, Tensor]:
        return FusedLinearForPPO()(h, weight, targets)[:2]

    live = few != 0
    families = {
        "log-prob and entropy, both with gradient, head trained": {
            "naive": lambda: both(naive(w)),
            "TRL, from logits": lambda: both(from_logits()),
            "TRL, chunked": lambda: both(chunked(w)),
            "verl, fused": lambda: both(verl(w)),
            "ours, recompute": lambda: both(head_logprobs(h, w, targets)),
            "ours, objective in forward": lambda: head_objective(
                h, w, targets, lambda logprobs, entropies, rows: logprobs * a[rows] + BONUS * entropies
            )[0],
        },
        "head frozen (LoRA), entropy a value": {
            "naive": lambda: first(naive(frozen)),
            "TRL, chunked": lambda: first(chunked(frozen)),
            "verl, fused": lambda: first(verl(frozen)),
            "ours, frozen": lambda: first(head_logprobs(h, frozen, targets)),
        },
        "20 % of the tokens carry gradient, head trained": {
            "naive": lambda: first(naive(w), few),
            "TRL, chunked": lambda: first(chunked(w), few),
            "verl, fused": lambda: first(verl(w), few),
            "ours, recompute": lambda: first(head_logprobs(h, w, targets), few),
            "ours, objective in forward": lambda: head_objective(
                h, w, targets, lambda logprobs, entropies, rows: logprobs * few[rows]
            )[0],
            "ours, these rows alone": lambda: first(head_logprobs(h, w, targets, live=live), few),
        },
        "reverse KL to a teacher, student trained": divergence(h, w, frozen, a),
    }
    if FusedLinearForPPO is None:
        for variants in families.values():
            variants.pop("verl, fused", None)
    return families


def divergence(h: Tensor, w: Tensor, frozen: Tensor, a: Tensor) -> dict[str, Run]:
    """The teacher is the same head over other hidden states."""
    teacher = (h + 0.3 * torch.randn_like(h)).detach()

    def naive() -> Tensor:
        p, q = torch.log_softmax(h @ w.T, -1), torch.log_softmax(teacher @ frozen.T, -1)
        return ((p.exp() * (p - q)).sum(-1) * a).sum()

    return {
        "TRL, chunked": lambda: (ChunkedDivergenceFunction.apply(h, w, None, teacher, frozen, None, 1.0)[0] * a).sum(),
        "naive": naive,
        "ours": lambda: (head_divergence((h, w), (teacher, frozen)) * a).sum(),
    }


def times(families: dict[str, dict[str, Run]], args: argparse.Namespace) -> None:
    left, right = torch.randn(args.tokens, args.hidden), torch.randn(min(args.vocab, 8192), args.hidden)
    room = torch.empty(args.tokens, right.shape[0])
    scale = args.vocab / right.shape[0]
    floor = lambda: clock(lambda: torch.mm(left, right.T, out=room)) * scale  # noqa: E731
    floor()
    for title, variants in families.items():
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for _ in track(range(args.rounds), title):
            measured = {}
            for name, run in variants.items():
                before = floor()
                spent = clock(lambda run=run: run().backward())
                measured[name] = (spent, spent / ((before + floor()) / 2))
            base = next(iter(measured.values()))[0]
            for name, (spent, products) in measured.items():
                found[name].append((spent / base, products))
        print(f"\n{title}\n{'':28s} ratio (spread)         GEMMs")
        for name, rounds in found.items():
            ratios, products = [item[0] for item in rounds], statistics.median(item[1] for item in rounds)
            spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"{name:28s} {statistics.median(ratios):5.2f} {spread:16s} {products:5.2f}")


def memory(families: dict[str, dict[str, Run]]) -> None:
    for title, variants in families.items():
        base = 0.0
        next(reversed(variants.values()))().backward()  # gradients exist from here on
        print(f"\n{title}\n{'':28s} workspace MiB, ratio")
        for name, run in track(list(variants.items()), title):
            used = peak(run)
            base = base or used
            print(f"{name:28s} {used:8.0f} {used / base:8.3f}", flush=True)


def peak(run: Callable[[], Any], *, backward: bool = True) -> float:
    """MiB of resident memory above what was there before, at the worst moment; gradients that exist are added to."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = run()
    if backward:
        result.backward()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def clock(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def digits() -> None:
    """Relative errors of log-prob and entropy of confident tokens, against float64, float32 logits given."""
    vocab = 50_000
    print("greatest relative error against float64\n    gap  -log p      TRL chunked: log p, H      ours: log p, H")
    for gap in (5.0, 15.0, 25.0, 29.0):
        torch.manual_seed(0)
        targets = torch.randint(0, vocab, (16,))
        weight = torch.randn(vocab, 16) * 0.5
        weight[targets] = 0.0
        hidden = torch.eye(16)
        weight[targets, torch.arange(16)] = gap
        exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)
        wanted = exact.gather(1, targets[:, None])[:, 0], torch.special.entr(exact.exp()).sum(-1)
        pairs = (
            ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",))[:2],
            head_logprobs(hidden, weight, targets),
        )
        errors = [[float(((f.double() - w) / w).abs().max()) for f, w in zip(p, wanted, strict=True)] for p in pairs]
        print(f"{gap:7.0f} {-float(wanted[0].mean()):8.0e}", *(f"{x:12.0e} {y:12.0e}" for x, y in errors))


if __name__ == "__main__":
    main()
