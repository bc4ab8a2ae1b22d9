"""`caop-fast audit`: the calibration audit from the command line. Needs numpy; pictures need matplotlib."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

PASSED, GATE_FAILED, BAD_INPUT = 0, 1, 2

DESCRIPTION = """\
Judge how honest a model's stated confidence is, from a JSONL file with one answer a line. No GPU, no torch needed.

  {"prompt_id": "q1", "response": "Paris. Confidence: 0.95", "correct": 1}
  {"prompt_id": "q2", "response": "Lyon. Confidence: 90%",   "correct": 0}

A line holds
  correct      whether the answer is right: 1 or 0, true or false
and one of
  response     the answer's text; the last statement such as "Confidence: 0.85", "confidence: 85%", "8/10",
               <confidence>0.85</confidence> or {"confidence": 0.85} is read from it
  confidence   a number in [0, 1] you read yourself, or null where there was none (used if both are there)
and may hold
  prompt_id    (or id) which question it answers: intervals then resample questions, and models are compared question
               by question
  model        (or arm) which model answered: one row each, compared with the first one
"""

EPILOG = """\
examples:
  caop-fast audit answers.jsonl
  caop-fast audit before.jsonl after.jsonl --out report/        two models, with report/audit.html to look at
  caop-fast audit answers.jsonl --correct-field is_right --response-field completion
  caop-fast audit answers.jsonl --max-ece 0.1 --min-auroc 0.6   for CI: exit status 1 when a limit is broken
  cat answers.jsonl | caop-fast audit - --json                  everything as JSON on standard output

columns:
  gap     mean confidence minus accuracy; above 0 it claims more than it delivers
  ECE     expected calibration error; 0 means of the answers given at 70 %, 70 % are right
  Brier   mean squared distance between confidence and outcome; always saying 50 % scores 0.25
  SPR     chance that a right answer states strictly more confidence than a wrong one (ties count 0)
  AUROC   the same with ties counting one half; 0.5 says nothing about which answers are right
  floor   the ECE that a perfectly calibrated model with these confidences would measure, from noise alone

An answer whose confidence cannot be read counts as an error of 1 in "ECE upper", in the verdict and in the limits, so
leaving the statement out never helps.

exit status: 0 done (and within the limits), 1 a limit is broken, 2 the input or an option cannot be used
"""


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"takes a number from 0 to 1, got {text!r}")
    return value


def _level(text: str) -> float:
    value = _share(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError(f"takes a number between 0 and 1, such as 0.95, got {text!r}")
    return value


def _at_least(low: int) -> Any:
    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"takes a whole number of at least {low}, got {text!r}")
        return value

    return whole


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the `audit` command to what `ArgumentParser.add_subparsers` returned, and return its parser."""
    parser = subparsers.add_parser(
        "audit",
        help="judge how honest stated confidence is, from a JSONL file of answers",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="JSONL file, or - for standard input; several are compared"
    )
    fields = parser.add_argument_group("names of the fields")
    fields.add_argument("--response-field", default="response", metavar="NAME", help="the text (default: response)")
    fields.add_argument(
        "--confidence-field", default="confidence", metavar="NAME", help="the number (default: confidence)"
    )
    fields.add_argument("--correct-field", default="correct", metavar="NAME", help="right or wrong (default: correct)")
    fields.add_argument("--id-field", metavar="NAME", help="the question (default: prompt_id, else id)")
    fields.add_argument("--model-field", metavar="NAME", help="the model (default: arm, else model)")
    fields.add_argument(
        "--lenient",
        action="store_true",
        help="read a bare 85 as 85%%; such guesses are counted and shown; bare numbers up to 10 stay unread",
    )
    how = parser.add_argument_group("how to judge")
    how.add_argument("--baseline", metavar="MODEL", help="compare the others with this model (default: the first)")
    how.add_argument("--bins", type=_at_least(1), default=10, metavar="N", help="bins of the ECE (default: 10)")
    how.add_argument(
        "--edges",
        choices=("official", "exact"),
        default="official",
        help="bin edges: binary floats as in published results, or exact decimals, where 0.3, 0.6 and 0.7 open a bin",
    )
    how.add_argument("--level", type=_level, default=0.95, metavar="P", help="level of the intervals (default: 0.95)")
    how.add_argument(
        "--resamples", type=_at_least(10), default=1000, metavar="N", help="bootstrap draws (default: 1000)"
    )
    how.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="seed of the bootstrap (default: 0)")
    what = parser.add_argument_group("what to write")
    what.add_argument(
        "--out", metavar="DIR", help="write audit.json, audit.html, reliability.svg and reliability.png there"
    )
    what.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    limits = parser.add_argument_group("limits for CI")
    limits.add_argument("--max-ece", type=_share, metavar="X", help="exit with 1 if ECE (upper) is above X")
    limits.add_argument("--min-auroc", type=_share, metavar="X", help="exit with 1 if AUROC is below X")
    limits.add_argument(
        "--gate",
        action="append",
        default=[],
        metavar="MODEL",
        help="hold only this model to the limits (may be repeated)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the audit; returns the exit status: 0 done, 1 a limit is broken, 2 the input cannot be used."""
    # here, so that building the command line of other commands does not load numpy
    from caop_fast.calibration.answers import Fields, read_answers
    from caop_fast.calibration.audit import audit
    from caop_fast.calibration.plots import plots_unavailable
    from caop_fast.calibration.report import audit_table, write_report
    from caop_fast.calibration.verdict import gate

    if args.gate and args.max_ece is None and args.min_auroc is None:
        return _refuse("--gate needs a limit: --max-ece or --min-auroc")
    fields = Fields(
        response=args.response_field,
        confidence=args.confidence_field,
        correct=args.correct_field,
        **({} if args.id_field is None else {"prompt_id": (args.id_field,)}),
        **({} if args.model_field is None else {"model": (args.model_field,)}),
    )
    try:
        absent = _absent_field(args)
        if absent:
            return _refuse(absent)
        models = read_answers(
            args.files, fields, lenient=args.lenient, stdin=sys.stdin.buffer if "-" in args.files else None
        )
        missing = set(args.gate) - {model.name for model in models}
        if missing:
            present = ", ".join(model.name for model in models)
            return _refuse(f"--gate {sorted(missing)[0]!r} is not a model of the files; there are: {present}")
        report = audit(
            models,
            baseline=args.baseline,
            n_bins=args.bins,
            edges=args.edges,
            n_resamples=args.resamples,
            level=args.level,
            seed=args.seed,
        )
        written = write_report(report, models, args.out) if args.out else []
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    if args.json:
        _print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _print(audit_table(report))
        for path in written:
            _print(f"wrote {path}")
        if args.out and (reason := plots_unavailable()):
            _print(reason)
    failures = gate(report, max_ece=args.max_ece, min_auroc=args.min_auroc, models=args.gate)
    for failure in failures:
        _print(f"caop-fast audit: limit broken: {failure}", error=True)
    return GATE_FAILED if failures else PASSED


def _absent_field(args: argparse.Namespace) -> str | None:
    """An error message if a field named by an option is on no line of a file, as when it is misspelt; else None."""
    named = {
        "--response-field": args.response_field if args.response_field != "response" else None,
        "--confidence-field": args.confidence_field if args.confidence_field != "confidence" else None,
        "--id-field": args.id_field,
        "--model-field": args.model_field,
    }
    for path in args.files:
        if path == "-" or not any(named.values()):
            continue
        found: set[str] = set()
        with open(path, "rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # read_answers says what is wrong with it
                found |= set(record) if isinstance(record, dict) else set()
        for option, name in named.items():
            if name is not None and found and name not in found:
                return f"{option} {name!r}: no line of {path} has that field; there are: {', '.join(sorted(found))}"
    return None


def _refuse(message: str) -> int:
    _print(f"caop-fast audit: error: {message}", error=True)
    return BAD_INPUT


def _print(text: str, *, error: bool = False) -> None:
    """Print; characters that the terminal's encoding lacks become question marks."""
    from caop_fast.calibration.table import printable

    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = "\n".join(printable(line) for line in text.split("\n"))
    try:
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:  # the reader (``| head``) closed the pipe: print nothing more, and no traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
