"""What several tests of recipes share."""

import argparse

from tokencredit.cli import recipes as cli


def run_cli(*arguments: object) -> int:
    """Run `tokencredit recipes …` in this process and return its exit status."""
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["recipes", *map(str, arguments)])
    return args.handler(args)
