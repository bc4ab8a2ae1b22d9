"""Plant errors in a copy of the project, one at a time, and demand that the named test fails for each.

    python -m tools.plant_errors                 every planted error (minutes)
    python -m tools.plant_errors --only splice   those whose promise or folder contains the text

A test suite that passes says little until it has been seen to fail. There is one error for each promise that users
would be hurt by. The code to replace is found by its tokens, wherever it stands in the folder and however it is
formatted; it must occur exactly once (``tests/test_plant_errors.py`` checks that).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds for one test
LAYOUT = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}


class Plant(NamedTuple):
    """One planted error."""

    promise: str  # what users rely on
    folder: str  # where the code is
    old: str
    new: str
    test: str  # a pytest node id that must fail


class Place(NamedTuple):
    """Where code stands: characters [start, stop) of a file."""

    path: Path
    start: int
    stop: int


PLANTS = (
    Plant(
        "the gradient of reverse KL has its mean term",
        "caop_fast/losses/reference",
        "terms.append(-scaled_statistic(ratio, mean_ratio))",
        "pass",
        "tests/losses/test_distillation.py::test_gradcheck_each_output",
    ),
    Plant(
        "small divergences keep their digits",
        "caop_fast/losses/reference/divergence.py",
        "torch.where(difference.abs() <= zt / 2, (difference / zt).log1p(), log_zs - log_zt)",
        "log_zs - log_zt + 1e-6",
        "tests/losses/test_distillation.py::test_near_equal_distributions_keep_their_digits",
    ),
    Plant(
        "a token that both sides exclude adds nothing",
        "caop_fast/losses/reference/divergence.py",
        "terms.masked_fill_(e == 0, 0)",
        "pass",
        "tests/losses/test_distillation.py::test_minus_infinity",
    ),
    Plant(
        "a mean divides by the sum of the weights",
        "caop_fast/losses",
        "torch.where(total == 0, 1.0, total)",
        "torch.full_like(total, rows.shape[0])",
        "tests/losses/test_distillation.py",
    ),
    Plant(
        "rows of weight 0 cannot poison a gradient",
        "caop_fast/losses/backends",
        "gradient.index_fill_(0, (weights == 0).nonzero().view(-1), 0)",
        "pass",
        "tests/losses/test_distillation.py",
    ),
    Plant(
        "the label -100 means no label",
        "caop_fast/losses/reference/divergence.py",
        "torch.where(column == IGNORE_INDEX, 0.0, values)",
        "values",
        "tests/losses/test_distillation.py",
    ),
    Plant(
        "JSD weighs student and teacher as documented (Triton)",
        "kernels/caop_kernels",
        "share = tl.where(r >= 0, beta, 1.0 - beta)",
        "share = tl.where(r >= 0, 1.0 - beta, beta)",
        "tests/kernels/device/test_kernel_gradient.py",
    ),
    Plant(
        "the softcap's derivative is in the gradient (Triton)",
        "kernels/caop_kernels/gradient.py",
        "1.0 - v_s * v_s",
        "1.0 - v_s",
        "tests/kernels/device/test_kernel_gradient.py",
    ),
    Plant(
        "states of vocabulary shards merge exactly",
        "caop_fast/losses/reference/states.py",
        "q_s * d + (q_s - q_t) * z_t",
        "q_s * d",
        "tests/losses/test_states.py",
    ),
    Plant(
        "the student's top-k tail is a sum of its own",
        "caop_fast/losses/reference/topk.py",
        "tail = norm.tail_total.log() + (norm.tail_shift - norm.shift) - norm.total.log()",
        "tail = torch.log1p(-full.exp().sum(-1, keepdim=True).clamp(max=1))",
        "tests/losses/test_topk.py",
    ),
    Plant(
        "repeated teacher ids are refused",
        "caop_fast/losses/topk.py",
        "bool(twice.any())",
        "False",
        "tests/losses/test_topk.py",
    ),
    Plant(
        "unchecked, a teacher id out of range spoils its row",
        "caop_fast/losses/reference/topk.py",
        "(sorted_ids[:, :1] < -1) | (sorted_ids[:, -1:] >= vocab)",
        "torch.zeros_like(sorted_ids[:, :1], dtype=torch.bool)",
        "tests/losses/test_topk.py::test_an_unvalidated_id_out_of_range_gives_nan_in_its_row",
    ),
    Plant(
        "unchecked, a teacher id out of range spoils its row (Triton)",
        "kernels/caop_kernels/topk.py",
        "(ids < -1) | (ids >= n_cols) | ((ids == before) & (ids >= 0))",
        "(ids == before) & (ids >= 0)",
        "tests/kernels/device/test_kernel_topk.py::test_an_unvalidated_id_out_of_range_gives_nan_in_its_row",
    ),
    Plant(
        "unchecked, a repeated teacher id spoils its row",
        "caop_fast/losses/reference/topk.py",
        "outside | repeated_ids(sorted_ids).any(-1, keepdim=True)",
        "outside",
        "tests/losses/test_topk.py::test_an_unvalidated_id_listed_twice_gives_nan_in_its_row",
    ),
    Plant(
        "unchecked, a repeated teacher id spoils its row (Triton)",
        "kernels/caop_kernels/topk.py",
        "(ids == before) & (ids >= 0)",
        "(ids == before) & (ids > n_cols)",
        "tests/kernels/device/test_kernel_topk.py::test_an_unvalidated_id_listed_twice_gives_nan_in_its_row",
    ),
    Plant(
        "teacher ids may come in any order (Triton)",
        "kernels/caop_kernels/listed_ids.py",
        ".to(torch.int32).sort(-1).values",
        ".to(torch.int32)",
        "tests/kernels/device/test_kernel_topk.py::test_listed_columns_anywhere",
    ),
    Plant(
        "a reverse KL of +inf has no gradient (Triton)",
        "kernels/caop_kernels/gradient.py",
        'tl.where(mean_ratio == float("inf"), float("nan"), mean_ratio)',
        "mean_ratio",
        "tests/kernels/device/test_kernel_infinite.py",
    ),
    Plant(
        "confidence candidates may come in any order",
        "caop_fast/losses/reference/confidence.py",
        "ordered, order = values.sort()",
        "ordered, order = values, torch.arange(values.numel(), device=values.device)",
        "tests/losses/test_confidence.py::test_matches_the_definition",
    ),
    Plant(
        "repeated confidence candidates are refused",
        "caop_fast/losses/confidence.py",
        "ids.unique().numel() < ids.numel()",
        "False",
        "tests/losses/test_confidence.py::test_bad_input",
    ),
    Plant(
        "confidence candidates out of range give NaN (Triton)",
        "kernels/caop_kernels/confidence.py",
        'tl.where(valid, v, float("nan"))',
        "v",
        "tests/kernels/device/test_kernel_confidence.py::test_ids_out_of_range_give_nan_and_read_nothing",
    ),
    Plant(
        "mass cannot escape from the confidence candidates",
        "caop_fast/losses/reference/confidence.py",
        "h = h - options.outside_weight * grad_loss",
        "h = h + options.outside_weight * grad_loss",
        "tests/losses/test_confidence.py",
    ),
    Plant(
        "bins of the trained calibration error are those of the audit",
        "caop_fast/losses/reference/bins.py",
        "edges, right=True",
        "edges, right=False",
        "tests/losses/test_bins.py",
    ),
    Plant(
        "the gradient of an FSDP2 head is averaged over the ranks",
        "caop_fast/losses/linear",
        "lambda gradient: gradient / mesh.size()",
        "lambda gradient: gradient",
        "tests/losses/linear/test_linear_fsdp.py::test_a_sharded_head_passed_to_the_loss",
    ),
    Plant(
        "nothing privileged reaches the student's prompt",
        "caop_fast/caop",
        'system = row.get("system")',
        'system = row.get("system") or row.get("feedback")',
        "tests/caop/test_teacher_context.py",
    ),
    Plant(
        "the student is scored on its own prompt",
        "caop_fast/training/step.py",
        "completion_hidden(student, [g.student_prompt for g in groups]",
        "completion_hidden(student, [g.teacher_prompt for g in groups]",
        "tests/training/test_step.py",
    ),
    Plant(
        "a splice keeps the sampled ids",
        "caop_fast/caop/splice.py",
        "body, ending = sampled[:stop], sampled[stop:]",
        "body, ending = tokenizer.encode(_decode(tokenizer, sampled[:stop]), add_special_tokens=False), sampled[stop:]",
        "tests/caop/test_caop_splice.py::test_sampled_ids_survive_although_not_canonical",
    ),
    Plant(
        "a cut completion teaches nothing",
        "caop_fast/training/plan.py",
        "not rollout.ended",
        "False",
        "tests/training/test_step.py",
    ),
    Plant(
        "the teacher's prompt is never cut",
        "caop_fast/caop",
        "max_tokens is not None and len(ids) > max_tokens",
        "False",
        "tests/caop/test_teacher_context.py",
    ),
    Plant(
        "an unparsed answer never flatters",
        "caop_fast/calibration",
        "_ratio(_binned_error(c) + c.n_unparsed, c.total + c.n_unparsed)",
        "_ratio(_binned_error(c), c.total)",
        "tests/calibration/test_metrics.py",
    ),
    Plant(
        "a missing confidence is not zero",
        "caop_fast/calibration",
        "math.nan if parsed.value is None else parsed.value",
        "0.0 if parsed.value is None else parsed.value",
        "tests/calibration/test_audit_answers.py",
    ),
    Plant(
        "text of models stays text in the report",
        "caop_fast/calibration/page.py",
        "html.escape(printable(text), quote=True)",
        "printable(text)",
        "tests/calibration/test_page.py",
    ),
    Plant(
        "the averaged teacher moves from its first update on",
        "caop_fast/training",
        "self.average.n_averaged.fill_(1)",
        "self.average.n_averaged.fill_(0)",
        "tests/training/test_teacher_weights.py",
    ),
    Plant(
        "a resumed run does not drift",
        "caop_fast/training/loop.py",
        '"teacher": self.teacher.model.state_dict()',
        '"teacher": self.student.state_dict()',
        "tests/training/test_loop.py",
    ),
    Plant(
        "a checkpoint cannot run code",
        "caop_fast/training",
        "weights_only=True",
        "weights_only=False",
        "tests/training/test_loop.py",
    ),
)


class _Token(NamedTuple):
    text: str
    start: int
    stop: int


def _tokens(source: str) -> list[_Token]:
    """The tokens of some code, but for its layout and comments, and where they stand."""
    lines = source.splitlines(keepends=True)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    return [
        _Token(token.string, offsets[token.start[0] - 1] + token.start[1], offsets[token.end[0] - 1] + token.end[1])
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in LAYOUT
    ]


def _pattern(code: str) -> list[str]:
    """The tokens of a piece of code, which may leave brackets open."""
    found: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type not in LAYOUT:
                found.append(token.string)
    except tokenize.TokenError:  # an open bracket
        pass
    return found


def places(plant: Plant, root: Path = ROOT) -> list[Place]:
    """Where the code of a plant stands."""
    wanted = _pattern(plant.old)
    base = root / plant.folder
    found = []
    for path in [base] if base.is_file() else sorted(base.rglob("*.py")):
        tokens = _tokens(path.read_text(encoding="utf-8"))
        texts = [token.text for token in tokens]
        for i in range(len(texts) - len(wanted) + 1):
            if texts[i : i + len(wanted)] == wanted:
                found.append(Place(path, tokens[i].start, tokens[i + len(wanted) - 1].stop))
    return found


def verdict(plant: Plant, tree: Path) -> str | None:
    """Plant the error in ``tree``, run its test, take it out again; None when the test failed, else a complaint."""
    found = places(plant, tree)
    if len(found) != 1:
        return f"the code to replace occurs {len(found)} times, not once"
    path, start, stop = found[0]
    original = path.read_text(encoding="utf-8")
    path.write_text(original[:start] + plant.new + original[stop:], encoding="utf-8")
    try:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(tree), str(tree / "kernels"), str(tree / "tests")])
        if "kernels/device/" in plant.test:  # runs in this very process, so that is the one to interpret kernels
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", plant.test]
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    finally:
        path.write_text(original, encoding="utf-8")
    if done.returncode == 0:
        return f"{plant.test} still passes"
    if done.returncode != 1:  # 1 is "tests failed"; anything else means that none ran
        return f"{plant.test} did not run (pytest exit {done.returncode}): {done.stdout[-400:]}{done.stderr[-400:]}"
    return None


def main() -> int:
    """Run the chosen plants; 0 when every one was caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", metavar="TEXT", help="only errors whose promise or folder contains TEXT")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tests at a time (default: all cores)")
    options = parser.parse_args()
    plants = [plant for plant in PLANTS if options.only in plant.promise or options.only in plant.folder]
    if not plants:
        parser.error(f"no planted error matches --only {options.only!r}")
    escaped = 0
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        local = threading.local()

        def run(plant: Plant) -> str | None:
            if not hasattr(local, "tree"):  # one copy of the project for each worker
                local.tree = Path(tempfile.mkdtemp(dir=folder)) / "project"
                ignored = shutil.ignore_patterns(".*", "__pycache__", "results", "build", "dist", "runs")
                shutil.copytree(ROOT, local.tree, ignore=ignored)
            return verdict(plant, local.tree)

        with ThreadPoolExecutor(options.jobs) as pool:
            for plant, complaint in zip(plants, pool.map(run, plants), strict=True):
                escaped += complaint is not None
                print(f"{'caught ' if complaint is None else 'ESCAPED'}  {plant.promise}", flush=True)
                if complaint:
                    print(f"         {complaint}", flush=True)
    print(f"{len(plants) - escaped} passed, {escaped} failed")
    return 1 if escaped else 0


if __name__ == "__main__":
    sys.exit(main())
