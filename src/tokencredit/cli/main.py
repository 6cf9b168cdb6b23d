"""`tokencredit`: data to stdout, logs to stderr, one line and `hint:` for what is wrong, exit code 2."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from tokencredit.errors import TokenCreditError
from tokencredit.runs import world

VERBS = ("train", "compare", "bench", "report", "recipes", "methods", "doctor")
TOGETHER = ("train", "doctor")  # what several processes may run


def build_parser() -> argparse.ArgumentParser:
    """All verbs; each lives in a module of its name with `add_parser(subparsers)`."""
    parser = argparse.ArgumentParser(
        prog="tokencredit", description="Credit assignment in LLM post-training: which tokens deserve the gradient?"
    )
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        importlib.import_module(f"tokencredit.cli.{verb}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 when the input cannot be used, 130 when interrupted."""
    arguments = build_parser().parse_args(argv)
    try:
        world.check()
        if world.size() > 1 and arguments.verb not in TOGETHER:
            raise TokenCreditError(f"`tokencredit {arguments.verb}` runs in one process, WORLD_SIZE is {world.size()}")
        return world.leave(int(arguments.handler(arguments)))
    except TokenCreditError as error:
        world.leave_reason(error.message, error.hint)
        _tell(f"error: {world.name()}{error.message}", *([f"hint: {error.hint}"] if error.hint else []))
        return world.leave(2)
    except KeyboardInterrupt:
        _tell("interrupted; the same command goes on from here")
        return world.leave(130)
    except RuntimeError as error:
        if not world.lost_another(error):
            raise
        world.leave_reason("another process of the run has gone", lost=True)
        _tell(f"error: {world.name()}another process of the run has gone")
        return world.leave(1)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _tell(*lines: str) -> None:
    """To stderr; with several processes, once."""
    if world.speaks():
        print(*lines, sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
