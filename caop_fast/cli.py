"""The command line: ``caop-fast demo`` and ``caop-fast audit``. Each subcommand loads only what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from caop_fast import __version__
from caop_fast.calibration import command as audit
from caop_fast.demo import command as demo

DESCRIPTION = """\
Calibration-aware on-policy distillation.

  demo     see in minutes, on a CPU, what plain distillation does to a model's confidence and what CaOP gives back
  audit    measure how honest any model's stated confidence is, from a JSONL file of its answers (no GPU, no torch)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the process's) and run the subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="caop-fast", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"caop-fast {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="{demo,audit}")
    demo.add_parser(subparsers)
    audit.add_parser(subparsers)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
