"""What credit itself costs: time and memory of every preset by batch size, and what ranks say to each other.

    python benchmarks/scale_pure.py [--tokens 1 4 16] [--methods hapo gtpo] [--ranks 1 2 4] [--json]

Sizes are in millions of tokens (2²⁰), responses have 1024 of them, groups eight. Each measurement runs in a process of
its own, forked beside a batch that lies ready: seconds of CPU on one thread, and how far memory rose above that batch.
With several ranks the same batch is split by rows; time is that of the slowest rank, traffic what one rank hands in.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from tokencredit import PRESETS, assign_credit, get_pipeline
from tokencredit.batch.records import OPTIONAL_FIELDS, TokenBatch
from tokencredit.batch.reduce import LOCAL, ProcessGroupReducer, Reducer
from tokencredit.progress import track
from tokencredit.seeds import generator

RESPONSE, GROUP, MILLION = 1024, 8, 1 << 20
FORK = multiprocessing.get_context("fork")


class CountingReducer(ProcessGroupReducer):
    """Counts the collectives and the bytes that one rank hands to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def _count(self, local: torch.Tensor) -> None:
        self.calls += 1
        self.bytes += local.numel() * local.element_size()

    def total(self, local: torch.Tensor) -> torch.Tensor:
        self._count(local)
        return super().total(local)

    def maximum(self, local: torch.Tensor) -> torch.Tensor:
        self._count(local)
        return super().maximum(local)

    def labels(self, group_ids: torch.Tensor) -> torch.Tensor:
        self._count(group_ids.unique())
        return super().labels(group_ids)


def make_fields(rows: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Random fields of a batch: skewed like entropies, negative where they are log-probs; some rows are short."""
    rng = generator("scale", rows)
    lengths = torch.randint(RESPONSE // 2, RESPONSE + 1, (rows, 1), generator=rng)
    fields = {
        "response_ids": torch.randint(0, 32_000, (rows, RESPONSE), generator=rng),
        "response_mask": torch.arange(RESPONSE) < lengths,
        "rewards": (torch.rand(rows, generator=rng) < 0.4).float(),
        "group_ids": torch.arange(rows) // GROUP,
    }
    for name in names:
        shape = (rows,) if name in ("host_advantages", "doubling_ratios") else (rows, RESPONSE)
        values = torch.rand(shape, generator=rng)
        if name.endswith("logprobs"):
            fields[name] = values.clamp_min_(1e-6).log_()
        else:
            fields[name] = values if name == "values" else values.square_().mul_(4.0)
    return fields


def measured(method: str, fields: dict[str, torch.Tensor], reducer: Reducer = LOCAL) -> dict[str, float]:
    """CPU seconds of `assign_credit` and how many bytes memory rose meanwhile."""
    pipeline = get_pipeline(method)
    batch = TokenBatch(**fields, progress=0.5, step=30, reducer=reducer)
    rng = generator("scale", "draws") if pipeline.draws else None
    before = _peak()
    start, wall = time.thread_time(), time.perf_counter()
    assign_credit(pipeline, batch, generator=rng)
    return {
        "seconds": time.thread_time() - start,
        "wall": time.perf_counter() - wall,
        "bytes": _peak() - before,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def forked(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a process of its own, which starts with what lies in memory here."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"the measurement of {arguments[0]} died: out of memory?") from None
    finally:
        process.join()


def _send(connection: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(work(*arguments))


def on_rank(rank: int, world: int, method: str, fields: dict[str, torch.Tensor], folder: str) -> dict[str, float]:
    """One rank of a gloo group: its time and what it handed to collectives."""
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/{method}-{world}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    rows = len(fields["rewards"]) // world
    own = {name: value[rank * rows : (rank + 1) * rows] for name, value in fields.items()}
    reducer = CountingReducer()
    torch.distributed.barrier()
    found = measured(method, own, reducer)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found | {"calls": float(reducer.calls), "traffic": float(reducer.bytes)}


def by_ranks(method: str, fields: dict[str, torch.Tensor], world: int) -> dict[str, float]:
    """The slowest rank, and the traffic of one."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = [FORK.Pipe(duplex=False) for _ in range(world)]
        processes = [
            FORK.Process(target=_send, args=(pipe[1], on_rank, (rank, world, method, fields, folder)))
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        found = [pipe[0].recv() for pipe in pipes]
        for process in processes:
            process.join()
    return {key: max(item[key] for item in found) for key in found[0]}


def by_size(methods: Sequence[str], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """One row a method: seconds and memory at each size, and growth per growth of the batch."""
    table: dict[str, dict[str, Any]] = {method: {"method": method} for method in methods}
    jobs = [(size, method) for size in sizes for method in methods]
    fields: dict[str, torch.Tensor] = {}
    names = sorted(set().union(*(get_pipeline(method).requires for method in methods)) & set(OPTIONAL_FIELDS))
    for size, method in track(jobs, "by size"):
        if not fields or len(fields["rewards"]) != size * MILLION // RESPONSE:
            fields = make_fields(size * MILLION // RESPONSE, names)
        needed = {*get_pipeline(method).requires, "response_ids", "response_mask", "rewards", "group_ids"}
        found = forked(measured, method, {name: value for name, value in fields.items() if name in needed})
        table[method][f"seconds_{size}"] = found["seconds"]
        table[method]["bytes_per_token"] = found["bytes"] / (size * MILLION)
    for row in table.values():
        growth = row[f"seconds_{sizes[-1]}"] / max(row[f"seconds_{sizes[-2]}"], 1e-9) if len(sizes) > 1 else 1.0
        row["growth"] = growth * (sizes[-2] / sizes[-1]) if len(sizes) > 1 else 1.0
    return list(table.values())


def by_world(methods: Sequence[str], size: int, worlds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a method: seconds of the slowest rank, collectives and bytes, for each number of ranks."""
    rows = []
    for method in track(methods, "by ranks"):
        fields = make_fields(size * MILLION // RESPONSE, sorted(get_pipeline(method).requires & set(OPTIONAL_FIELDS)))
        row: dict[str, Any] = {"method": method}
        for world in worlds:
            found = by_ranks(method, fields, world)
            row |= {f"{key}_{world}": found[key] for key in ("seconds", "calls", "traffic")}
        rows.append(row)
    return rows


def show_sizes(sizes: Sequence[int], rows: list[dict[str, Any]]) -> None:
    """The table of sizes; printed before the ranks start, as both halves take minutes."""
    head = "".join(f"{f'{size}M, s':>10}" for size in sizes)
    print(f"{'method':24}{head}{'growth':>9}{'bytes/token':>13}")
    for row in rows:
        times = "".join(f"{row[f'seconds_{size}']:10.2f}" for size in sizes)
        print(f"{row['method']:24}{times}{row['growth']:9.2f}{row['bytes_per_token']:13.0f}")
    slowest = max(rows, key=lambda row: row[f"seconds_{sizes[-1]}"])
    print(f"slowest at {sizes[-1]}M tokens: {slowest['method']}, {slowest[f'seconds_{sizes[-1]}']:.2f} s of one thread")
    if len(sizes) > 1:
        print(f"growth: time per token at {sizes[-1]}M over {sizes[-2]}M; 1 is linear", flush=True)


def show_ranks(size: int, worlds: Sequence[int], rows: list[dict[str, Any]]) -> None:
    """The table of ranks."""
    print(f"{size}M tokens over ranks: CPU seconds of the slowest rank, collectives, KiB that a rank hands in")
    head = "".join(f"{f'{world} ranks, s':>13}" for world in worlds)
    print(f"{'method':24}{head}{'collectives':>13}{'KiB':>9}")
    for row in rows:
        times = "".join(f"{row[f'seconds_{world}']:13.2f}" for world in worlds)
        last = worlds[-1]
        print(f"{row['method']:24}{times}{row[f'calls_{last}']:13.0f}{row[f'traffic_{last}'] / 1024:9.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16], help="millions of tokens, rising")
    parser.add_argument("--methods", nargs="+", default=sorted(PRESETS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank-methods", nargs="+", default=["surprisal", "hapo", "gtpo", "empg", "forking_tokens"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size_rows = by_size(arguments.methods, arguments.tokens)
    if not arguments.json:
        show_sizes(arguments.tokens, size_rows)
    world_rows = by_world(arguments.rank_methods, arguments.tokens[-1], arguments.ranks)
    if arguments.json:
        print(json.dumps({"by_size": size_rows, "by_ranks": world_rows}))
    else:
        show_ranks(arguments.tokens[-1], arguments.ranks, world_rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
