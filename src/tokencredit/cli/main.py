"""`tokencredit`: data to stdout, logs to stderr, one line and `hint:` for what is wrong, exit code 2."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from tokencredit.errors import TokenCreditError

VERBS = ("train", "compare", "bench", "report", "recipes", "methods", "doctor")


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
        return int(arguments.handler(arguments))
    except TokenCreditError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
