"""Everything that a rented GPU should say, in one run that ends by itself.

    python benchmarks/gpu.py --out gpu-results                  # 450 s at most
    python benchmarks/gpu.py --out gpu-results --only C E       # some sections
    python benchmarks/gpu.py --out curves --train FOLDER        # 60 steps, four methods, two seeds, on a model
    python benchmarks/gpu.py --tiny                             # toy shapes on a CPU: does every section run?

Sections: A ceilings of the card · B correctness (`pytest -m gpu`, kernels and head against float64) · C the head ·
D attention rows · E a trainer's step at Qwen3-0.6B's shape with responses of 8,192 tokens · F credit of 16M tokens ·
G the quickstart for 20 steps. `results.json` and `table.md` in --out are written after every section.

Nothing is downloaded. On a machine without a network bring these wheels, made with `pip download --no-deps`:

    trl 1.16.0, peft 0.21.2, datasets, dill, multiprocess, xxhash, beartype, jaxtyping, reasoning-gym, liger-kernel

    pip install --no-index --no-deps --target SITE *.whl
    PYTHONPATH=SITE:src HF_HUB_OFFLINE=1 python benchmarks/gpu.py --out gpu-results

torch 2.8 or later with its triton, transformers, accelerate, numpy, scipy, matplotlib, rich, jinja2, pytest and
hypothesis must be there. Liger is one of the heads that C compares; without it that row says so.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gpu_parts import credit, kernels, trainer
from gpu_parts.measure import Bench, OutOfTimeError

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "A": kernels.ceilings,
    "B": kernels.correctness,
    "C": kernels.head,
    "D": kernels.attention,
    "E": trainer.steps,
    "F": credit.credit,
    "G": trainer.quickstart,
}


def main() -> int:
    """Run the sections until they are done or the deadline is near."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--deadline", type=float, default=450.0, help="seconds after which no section starts")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections")
    parser.add_argument("--train", nargs="?", const="tiny", metavar="MODEL", help="training curves; default: the lab's")
    parser.add_argument("--tiny", action="store_true", help="toy shapes on the CPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        print("no CUDA device here, so there is nothing to measure; --tiny tries the script on a CPU")
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if arguments.tiny else "cuda")
    bench = Bench(device, arguments.tiny, arguments.out, time.monotonic() + arguments.deadline)
    bench.say(machine(device))
    bench.keep("machine", {"name": bench.lines[0]})
    if arguments.train:
        trainer.curves(bench, arguments.train)
        return 0
    failed = [name for name in SECTIONS if name in arguments.only and not run(bench, name)]
    bench.say(f"{arguments.deadline - bench.left():.0f} s; skipped or failed: {' '.join(failed) or 'nothing'}")
    bench.keep("end", {"failed": failed})
    return 1 if failed and arguments.tiny else 0


def run(bench: Bench, name: str) -> bool:
    """One section; its failure or the deadline ends it and no other one."""
    try:
        SECTIONS[name](bench)
    except OutOfTimeError:
        bench.say(f"{name}  cut: the deadline is near")
        return False
    except Exception as error:  # the others may still run, and machine time is short
        bench.say(f"{name}  failed: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
        if bench.tiny:
            raise
        return False
    finally:
        bench.keep(name, {})
        bench.free()
    return True


def machine(device: torch.device) -> str:
    """Card, versions and commit."""
    names = ("torch", "triton", "transformers", "trl", "peft", "liger-kernel")
    versions = [f"{name} {found}" for name in names if (found := _version(name))]
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, toy shapes: no number here means anything"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return ", ".join([card, *versions, f"commit {commit.stdout.strip() or 'unknown'}"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
