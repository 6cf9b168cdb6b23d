"""`assign_credit` beside what a user would write: plain vectorised float32 torch, one copy, and the step's metrics.

    python benchmarks/assign.py [--tokens 1 4 16] [--rounds 15] [--json]

Sizes are in millions of tokens (2²⁰), responses have 1024 of them, a quarter of which is padding, groups eight that lie
together. Everything takes turns within a round, on one thread, and time is CPU time of that thread: medians, and the
middle half of the ratios of a round. "floor" is the time that a copy takes to move the bytes which the method must at
least read and write (float32 fields, the mask, the result). "error" is the greatest difference of the plain version and
of ours from the same formula in float64, relative to the greatest credit.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scale_pure import GROUP, MILLION, RESPONSE, make_fields
from torch import Tensor

from tokencredit import assign_credit
from tokencredit.batch.records import TokenBatch
from tokencredit.diagnostics.summary import credit_metrics
from tokencredit.progress import track

Fields = Mapping[str, Tensor]


def normalized(fields: Fields, dtype: torch.dtype) -> Tensor:
    """One number a response: the reward in standard deviations of its group."""
    rewards = fields["rewards"].to(dtype).view(-1, GROUP)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-6)).view(-1, 1)


def grpo(fields: Fields, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.where(fields["response_mask"], normalized(fields, dtype), 0.0)


def hapo(fields: Fields, dtype: torch.dtype = torch.float32) -> Tensor:
    mask = fields["response_mask"]
    a = normalized(fields, dtype)
    h = torch.where(mask, fields["entropies"].to(dtype), 0.0)
    count = mask.view(len(mask) // GROUP, -1).sum(1)
    mean = (h.view(len(count), -1).sum(1) / count).repeat_interleave(GROUP)[:, None]
    centred = torch.where(mask, h - mean, 0.0)
    std = (centred.square().view(len(count), -1).sum(1) / count).sqrt().repeat_interleave(GROUP)[:, None]
    z = centred / (std + 1e-6)
    bound = a.abs() / 2.0
    return torch.where(mask, a + 0.2 * a.sign() * z.clamp(-bound, bound), 0.0)


def surprisal(fields: Fields, dtype: torch.dtype = torch.float32) -> Tensor:
    mask = fields["response_mask"]
    scores = torch.where(mask, -fields["old_logprobs"].to(dtype), 0.0)
    return normalized(fields, dtype) * (mask.sum(1, keepdim=True) * scores / scores.sum(1, keepdim=True))


def empg(fields: Fields, dtype: torch.dtype = torch.float32) -> Tensor:
    mask, h = fields["response_mask"], fields["entropies"].to(dtype)
    least, greatest = torch.where(mask, h, torch.inf).min(), torch.where(mask, h, -torch.inf).max()
    h = (h - least) / (greatest - least)
    decay = torch.where(mask, torch.exp(-h), 0.0)
    gain = decay / (decay.sum() / mask.sum())
    bonus = torch.zeros_like(h)
    bonus[:, :-1] = torch.where(mask[:, 1:], 0.1 * torch.exp(-h[:, 1:]), 0.0)
    credit = torch.where(mask, normalized(fields, dtype) * gain + bonus, 0.0)
    return torch.where(mask, credit - credit.sum() / mask.sum(), 0.0)


def forking_tokens(fields: Fields, dtype: torch.dtype = torch.float32) -> Tensor:
    mask, h = fields["response_mask"], fields["entropies"]
    inside = h[mask]
    kept = int(np.ceil(round(0.2 * len(inside), 9)))
    high = mask & (h >= inside.kthvalue(len(inside) - kept + 1).values)
    return torch.where(high, normalized(fields, dtype) * (len(inside) / high.sum()), 0.0)


# The plain version, and the bytes a token that must move: float32 fields, the mask, the result.
METHODS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "grpo": (grpo, 5),
    "hapo": (hapo, 9),
    "surprisal": (surprisal, 9),
    "empg": (empg, 9),
    "forking_tokens": (forking_tokens, 9),
}


def seconds(work: Callable[[], Any]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(method: str, fields: Fields, rounds: int) -> dict[str, Any]:
    """Median seconds of ours, of the plain version, of the metrics and of a copy, and their ratios by round."""
    plain, bytes_moved = METHODS[method]
    batch = TokenBatch(**fields)
    credit, exact = assign_credit(method, batch), plain(fields, torch.float64)
    base = normalized(fields, torch.float32)[:, 0]
    source = torch.empty(batch.response_mask.numel() * bytes_moved // 8)
    target = torch.empty_like(source)
    works: dict[str, Callable[[], Any]] = {
        "ours": lambda: assign_credit(method, batch),
        "plain": lambda: plain(fields),
        "metrics": lambda: credit_metrics(batch, credit, base),
        "floor": lambda: target.copy_(source),
    }
    times = np.array([[seconds(work) for work in works.values()] for _ in range(rounds + 1)])[1:]
    row: dict[str, Any] = {"method": method, "tokens": batch.response_mask.numel()}
    row |= dict(zip(works, np.median(times, 0).tolist(), strict=True))
    for name, column in (("plain", 1), ("floor", 3)):
        row[f"ours/{name}"] = np.quantile(times[:, 0] / times[:, column], [0.25, 0.5, 0.75]).tolist()
    row["metrics/ours"] = np.quantile(times[:, 2] / times[:, 0], [0.25, 0.5, 0.75]).tolist()
    largest = float(exact.abs().max())
    row["error"] = [float((found - exact).abs().max()) / largest for found in (credit, plain(fields))]
    return row


def show(rows: list[dict[str, Any]]) -> None:
    """One line a method and size: milliseconds, ratios with their middle half, errors."""
    print(
        f"{'method':16}{'tokens':>8}{'ours':>9}{'plain':>9}{'metrics':>9}   ours/plain        ours/floor       ", end=""
    )
    print("metrics/ours      error ours, plain")
    for row in rows:
        ratios = "   ".join(
            f"{middle:5.2f} ({low:.2f}–{high:.2f})"
            for low, middle, high in (row[name] for name in ("ours/plain", "ours/floor", "metrics/ours"))
        )
        times = "".join(f"{1e3 * row[name]:9.1f}" for name in ("ours", "plain", "metrics"))
        errors = ", ".join(f"{error:.1e}" for error in row["error"])
        print(f"{row['method']:16}{row['tokens'] / MILLION:7.0f}M{times}   {ratios}   {errors}")


def processor() -> str:
    """The model of the processor, where the system says."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16], help="millions of tokens")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size, method in track([(size, method) for size in arguments.tokens for method in arguments.methods], "assign"):
        fields = make_fields(size * MILLION // RESPONSE, ["entropies", "old_logprobs"])
        rows.append(measure(method, fields, arguments.rounds))
    if arguments.json:
        print(json.dumps({"processor": processor(), "torch": torch.__version__, "rows": rows}))
    else:
        show(rows)
        print(f"{processor()}, one thread, torch {torch.__version__}, {arguments.rounds} rounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
