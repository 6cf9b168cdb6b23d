"""`tokencredit`: data to stdout, logs to stderr, one line and `hint:` for what is wrong, exit code 2.

Each verb is a module of its name, imported when the verb runs: `tokencredit --help` needs neither torch nor TRL.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from tokencredit.errors import TokenCreditError
from tokencredit.progress import printable
from tokencredit.runs import processes
from tokencredit.runs.stop import RESUME, Stopped

VERBS = {
    "train": "one run: TRL's GRPO trainer with a credit pipeline",
    "compare": "runs side by side, a table with intervals, a report",
    "bench": "every method against the exact credit and the exact gradient",
    "audit": "where each method would put the credit, on the same responses of a model",
    "report": "a self-contained HTML page of one run or several",
    "recipes": "data recipes for SFT: measure a pool of samples, choose from it, search for the best choice",
    "methods": "list the methods: equation, inputs, hyperparameters, paper",
    "doctor": "check the installation: versions, devices, what to fix",
}
TOGETHER = ("train", "doctor")  # what several processes may run
# What torch and safetensors say where a file cannot be written, which for them is no OSError.
WRITE_FAILURES = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream error",
    "No space left",
    "StorageFull",
    "Disk quota",
)


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Build the parser with the arguments of `verb`; the other verbs, or all with None, are only listed."""
    parser = argparse.ArgumentParser(
        prog="tokencredit", description="Credit assignment in LLM post-training: which tokens deserve the gradient?"
    )
    parser.add_argument("--version", action="version", version=f"tokencredit {version('tokencredit')}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        if name == verb:
            importlib.import_module(f"tokencredit.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      0 when it worked; 2 when the input, a file or the memory of this machine cannot be used; 1 when another process of
      the run has gone; 130 after Ctrl-C; 143 after SIGTERM.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    given = list(sys.argv[1:] if argv is None else argv)
    verb = next((item for item in given if not item.startswith("-")), None)
    try:
        arguments = build_parser(verb).parse_args(given)
        processes.check()
        if processes.size() > 1 and arguments.verb not in TOGETHER:
            raise TokenCreditError(
                f"`tokencredit {arguments.verb}` runs in one process, WORLD_SIZE is {processes.size()}"
            )
        return processes.leave(int(arguments.handler(arguments)))
    except TokenCreditError as error:
        return _refuse(error.message, error.hint)
    except KeyboardInterrupt:
        _tell(f"interrupted; {RESUME}" if verb in ("train", "compare") else "interrupted")
        return processes.leave(130)
    except Stopped as stopped:
        _tell(f"{stopped.message}; {RESUME}")
        return processes.leave(stopped.code)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _refuse("this machine's memory is full", "lower trainer.per_device_train_batch_size")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _refuse(f"{error.strerror or error}{where}", None)
    except Exception as error:
        return _explain_host_error(error)


def _explain_host_error(error: Exception) -> int:
    """Tell faults of the machine, which libraries raise in their own ways, in one line; anything else is a bug."""
    text = " ".join(str(error).split())
    if processes.lost_another(error):
        processes.leave_reason("another process of the run has gone", lost=True)
        _tell(f"error: {processes.name()}another process of the run has gone")
        return processes.leave(1)
    if any(words in text for words in WRITE_FAILURES):
        return _refuse(f"a file could not be written: {text[:300]}", "free some space; the same command goes on")
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return _refuse(f"out of memory: {text[:300]}", "lower trainer.per_device_train_batch_size")
    raise error


def _refuse(message: str, hint: str | None) -> int:
    processes.leave_reason(message, hint)
    _tell(f"error: {processes.name()}{message}", *([f"hint: {hint}"] if hint else []))
    return processes.leave(2)


def _tell(*lines: str) -> None:
    """To stderr; with several processes, once."""
    if processes.speaks():
        print(*(printable(line) for line in lines), sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
