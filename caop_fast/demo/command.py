"""``caop-fast demo``: arguments, terminal output, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

TASKS = ("pronounce", "sums")
METHODS = ("base", "opd", "caop", "direct", "masked")

DESCRIPTION = """\
Train a small language model from scratch on a real task, distil it on-policy in several ways, and show what each does
to its accuracy and to the confidence it states. Takes a few minutes on a CPU; needs no GPU and no download.

The methods, all from the same base model and the same prompts:
  base     the model before distillation
  opd      plain on-policy distillation: answer and confidence both learnt from a teacher that saw the solution
  caop     calibration-aware: the confidence target is the model's own success rate over its rollouts
  direct   the success rate taught by a loss on the confidence value itself
  masked   control: plain distillation, nothing learnt about the confidence value

It ends with a table, a verdict in two sentences and one HTML page with pictures. All is kept in the run's folder:
summary.json, demo.html, the models, and every held-out answer as JSONL that `caop-fast audit` reads.
Ctrl-C stops it safely; the same command then goes on from there (an unfinished base model starts again). A run in the
folder that is finished, or that had other options, is moved aside, never overwritten.
"""

EXAMPLES = """\
examples:
  caop-fast demo
  caop-fast demo --task sums --seed 3 --out runs/sums
  caop-fast demo --methods base opd caop
  caop-fast audit runs/demo/answers/opd.jsonl runs/demo/answers/caop.jsonl
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the ``demo`` subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="train, distil and compare on a small real task, on CPU, in minutes",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="pronounce",
        help="pronounce: English spelling to phonemes (default); sums: addition with smudged digits, whose ideal "
        "confidence is known in closed form",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same numbers on one machine (0)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help="which methods to run (all)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run's folder (runs/demo)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when done, 1 when a method failed, 2 on bad input, 130 on Ctrl-C, 141 on closed output."""
    try:
        from caop_fast.demo.page import PAGE_NAME, demo_table, demo_verdict
        from caop_fast.demo.run import DemoConfig, MethodFailed, run_demo
    except ModuleNotFoundError as error:
        return _refuse(f"the demo needs the package {error.name!r}; install it with: pip install 'caop-fast[demo]'")
    try:
        config = DemoConfig(task=args.task, seed=args.seed, methods=tuple(args.methods), out=args.out)
        summary = run_demo(config)
    except BrokenPipeError:
        return _output_closed()
    except MethodFailed as error:
        print(f"caop-fast demo: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        done = sorted(p.parent.name for p in args.out.glob("methods/*/result.json"))
        print(
            f"\nStopped. Finished methods: {', '.join(done) or 'none'}. The same command goes on from here.",
            file=sys.stderr,
        )
        return 130
    try:
        print(demo_table(summary))
        print(f"\n{demo_verdict(summary)}\n")
        print(f"Page: {(args.out / PAGE_NAME).resolve()}   ({summary['seconds']:.0f} s)", flush=True)
    except BrokenPipeError:
        return _output_closed()
    return 0


def _output_closed() -> int:
    """The reader of a pipe (``| head``) went away: leave the interpreter nothing to complain of when it flushes."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    return 141  # 128 + SIGPIPE


def _refuse(message: str) -> int:
    print(f"caop-fast demo: {message}", file=sys.stderr)
    return 2
