"""Clocks, counters and the report of the GPU script; on a CPU the same calls run and count nothing."""

import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]


class OutOfTimeError(Exception):
    """The deadline is near; what follows is left out."""


@dataclass
class Timing:
    """One variant: median, least and greatest milliseconds; launches and waits of one call; peak MiB above before."""

    ms: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    launches: int = 0
    waits: int = 0
    mib: float = 0.0
    failed: str = ""


@dataclass
class Bench:
    """Where to measure and where to write; `end` is a time of `time.monotonic`."""

    device: torch.device
    tiny: bool
    out: Path
    end: float
    results: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """True on a GPU; False on the CPU, where only the script itself is tested."""
        return self.device.type == "cuda"

    def size(self, full: int, tiny: int) -> int:
        """A size of the plan, or a toy one."""
        return tiny if self.tiny else full

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.end - time.monotonic()

    def check_time(self, needed: float = 5.0) -> None:
        """Raise where less than so many seconds are left."""
        if self.left() < needed:
            raise OutOfTimeError

    def say(self, line: str) -> None:
        """A line of the table, printed at once and kept for the end."""
        print(line, flush=True)
        self.lines.append(line)

    def keep(self, section: str, values: Mapping[str, Any]) -> None:
        """Put numbers into `results.json`, and the table so far into `table.md`; a run that is cut off still counts."""
        self.results.setdefault(section, {}).update(values)
        text = json.dumps(self.results, indent=1, default=asdict)
        (self.out / "results.json").write_text(text)
        (self.out / "table.md").write_text("```\n" + "\n".join(self.lines) + "\n```\n")

    def clock(self, run: Run) -> float:
        """Milliseconds of one call: between two events on a GPU, of the wall elsewhere."""
        if not self.on_gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))

    def time(self, arms: Mapping[str, Run], rounds: int = 7, warm: int = 3, limit: float = 4.0) -> dict[str, Timing]:
        """Times of several variants that take turns; one that fails or is slow is left out of further rounds.

        Args:
          limit: seconds; a variant whose first call takes longer is measured once.
        """
        rounds, warm = (1, 1) if self.tiny else (rounds, warm)
        found = {name: Timing() for name in arms}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for name, run in arms.items():
            self.check_time()
            try:
                self._first(run, found[name], times[name], warm, limit)
            except (RuntimeError, ImportError, TypeError, ValueError) as error:  # out of memory is a RuntimeError
                if self.tiny and not isinstance(error, ImportError):
                    raise
                found[name].failed = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            self.free()
        for _ in range(rounds):
            for name, run in arms.items():
                self.check_time()
                if not found[name].failed and (not times[name] or times[name][0] < limit * 1e3):
                    times[name].append(self.clock(run))
        for name, spent in times.items():
            measured = spent[1:] or spent
            if measured:
                found[name].ms, found[name].low, found[name].high = (
                    *(statistics.median(measured), min(measured)),
                    max(measured),
                )
        return found

    def _first(self, run: Run, timing: Timing, times: list[float], warm: int, limit: float) -> None:
        """Warm a variant up, count what it does, and note the time of one call."""
        spent = self.clock(run)
        for _ in range(warm - 1 if spent < limit * 1e3 else 0):
            run()
        times.append(self.clock(run))
        timing.launches, timing.waits = self.count(run)
        timing.mib = self.peak(run)

    def count(self, run: Run) -> tuple[int, int]:
        """Kernels that one call launches, and how often it waits for the device."""
        if not self.on_gpu:
            return 0, 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        launches = sum(event.device_type == cuda for event in profile.events())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return launches, sum("synchroniz" in str(item.message) for item in caught)

    def peak(self, run: Run) -> float:
        """MiB above what was allocated before."""
        if not self.on_gpu:
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def free(self) -> None:
        """Give memory back that nothing holds."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def table(bench: Bench, section: str, found: Mapping[str, Timing], base: float = 0.0, unit: str = "floor") -> None:
    """One line per variant; `base` milliseconds are 1."""
    for name, timing in found.items():
        if timing.failed:
            bench.say(f"   {name:34s} {timing.failed}")
            continue
        ratio = f"{timing.ms / base:7.2f} × {unit}" if base else ""
        bench.say(
            f"   {name:34s} {timing.ms:9.3f} ms ({timing.low:.3f}–{timing.high:.3f}) {ratio} "
            f"{timing.mib:8.0f} MiB {timing.launches:6d} launches {timing.waits:4d} waits"
        )
    bench.keep(section, dict(found))


@contextmanager
def patched(target: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or class set to other values inside."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def within(target: Any, run: Run, **values: Any) -> Run:
    """A call under `patched`."""

    def call() -> Any:
        with patched(target, **values):
            return run()

    return call
