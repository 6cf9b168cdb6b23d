"""Attention entropy of one layer: ours against one fused attention call, and eager attention with its maps.

One thread, CPU time of the thread, variants interleaved; memory is the peak of resident memory above the inputs. 16
query heads, 8 key heads, dimension 128, float32, unless told otherwise. The last table is the forward pass of a model
with entropies from every layer.

    python benchmarks/attention_entropy.py
    python benchmarks/attention_entropy.py --lengths 256 1024 --rounds 5
"""

import argparse
import logging
import math
import os
import statistics
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from head import clock, peak
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen3Config, Qwen3ForCausalLM

from tokencredit.collect.attention.entropies import probe_attention
from tokencredit.collect.attention.rows import Visibility, head_entropies, row_statistics
from tokencredit.progress import track

Layers = range | tuple[int, ...]
EAGER_MOST = 2048  # tokens; the maps of 4096 take gigabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048, 4096, 8192])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"heads {args.heads}/{args.key_heads}, dim {args.dim}, CPU {torch.backends.cpu.get_cpu_capability()}")
    print("time over one fused attention call, median (spread); peak MiB above inputs")
    with torch.no_grad():
        for length in track(args.lengths, "lengths"):
            print(f"\nT = {length}")
            table(variants(length, args, None), args.rounds)
            if length > args.window:
                print(f"T = {length}, window {args.window}")
                table(variants(length, args, args.window), args.rounds)
    model_pass(args.rounds)


def variants(length: int, args: argparse.Namespace, window: int | None) -> dict[str, Callable[[], object]]:
    query = torch.randn(1, args.heads, length, args.dim)
    key, value = (torch.randn(1, args.key_heads, length, args.dim) for _ in range(2))
    scale = args.dim**-0.5
    seen = torch.ones(length, length, dtype=torch.bool).tril() if window or length <= EAGER_MOST else None
    if window and seen is not None:
        seen &= ~seen.tril(-window)
    visibility = Visibility(lambda sequence, rows: seen[rows]) if window and seen is not None else Visibility()
    mask = seen if window else None

    def fused() -> Tensor:
        return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)

    def eager() -> Tensor:
        scores = (query @ key.repeat_interleave(args.heads // args.key_heads, 1).mT) * scale
        probs = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
        return (probs @ value.repeat_interleave(args.heads // args.key_heads, 1)), torch.special.entr(probs).sum(-1)

    found = {
        "fused attention": fused,
        "ours, head-averaged row": lambda: row_statistics(query, key, visibility, scale=scale),
        "ours, every head": lambda: head_entropies(query, key, visibility, scale=scale),
    }
    return found | ({"eager attention, entropy": eager} if length <= EAGER_MOST else {})


def table(found: dict[str, Callable[[], object]], rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, run in found.items():
            times[name].append(clock(run))
    base = times["fused attention"]
    for name, run in found.items():
        ratios = [mine / other for mine, other in zip(times[name], base, strict=True)]
        spread = f"({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:28s} {statistics.median(ratios):6.2f} {spread:16s} {peak(run, backward=False):8.1f}")


def model_pass(rounds: int) -> None:
    """A forward pass that also gives every head's entropies at every layer, over the plain one."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = Qwen3Config(
        vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    print("\nforward pass of a 4-layer model over the plain one")
    for length in (512, 2048):
        ids = torch.randint(0, 1000, (1, length))
        print(
            f"T = {length:5d} every layer, every head      ", pass_ratio(model, ids, range(4), head_entropies, rounds)
        )
        print(f"T = {length:5d} middle layer, head-averaged  ", pass_ratio(model, ids, (2,), row_statistics, rounds))


def pass_ratio(model: Qwen3ForCausalLM, ids: Tensor, layers: Layers, function: Callable, rounds: int) -> str:
    """Median ratio and spread of the probed pass to the plain one."""
    found = []
    for _ in range(rounds):
        plain = clock(lambda: forward(model, ids, (), function))
        found.append(clock(lambda: forward(model, ids, layers, function)) / plain)
    return f"{statistics.median(found):6.2f} ({min(found):.2f}-{max(found):.2f})"


@torch.no_grad()
def forward(model: Qwen3ForCausalLM, ids: Tensor, layers: Layers, function: Callable) -> None:
    if not layers:
        model(ids)
        return
    with probe_attention(model, layers, function):
        model(ids)


if __name__ == "__main__":
    main()
