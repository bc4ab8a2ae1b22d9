"""Output of the demo: a verdict in two sentences, tables for the terminal, and an HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caop_fast.calibration import page, plots
from caop_fast.calibration.answers import ModelAnswers
from caop_fast.calibration.counts import Answers
from caop_fast.calibration.files import write_atomic
from caop_fast.calibration.intervals import ece_floor
from caop_fast.calibration.metrics import constant_baseline
from caop_fast.calibration.table import format_table, format_value, metric_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE_NAME = "demo.html"
CALIBRATION_KEYS = ("accuracy", "mean_confidence", "overconfidence_gap", "ece", "brier", "spr", "auroc")
ENTROPY_KEYS = ("answer_entropy", "confidence_entropy")
METHOD_MEANINGS = {
    "base": "the model before distillation",
    "opd": "plain on-policy distillation: answer and confidence both copied from the teacher, who saw the solution",
    "caop": "calibration-aware distillation: the teacher is told the student's own success rate",
    "direct": "the success rate is taught by a loss on the confidence value itself",
    "masked": "control: plain distillation with no loss on the confidence value",
}
# changes smaller than these are not called changes: about twice the sampling error on some thousand answers
ACCURACY_CHANGE = 0.02
CALIBRATION_CHANGE = 0.05

# The glossary speaks of answers that can be read; here accuracy is over all of them.
UNREAD = (
    "Accuracy is the share of all answers that are right. An answer whose confidence cannot be read counts as an error "
    "of 1 in ECE and Brier here; the pictures show the answers that can be read."
)

HeldOut = Mapping[str, tuple[Any, Any, Any]]


def _method(summary: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A method's figures as they are judged: an answer whose confidence cannot be read counts as an error of 1."""
    method = next((method for method in summary["methods"] if method["name"] == name), None)
    return method and _judged(method)


def _judged(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics` with accuracy over all answers, and ECE and Brier where an unread answer is an error of 1."""
    stricter = {"accuracy": "accuracy_all", "ece": "ece_upper", "brier": "brier_upper"}
    return {**metrics, **{name: metrics[other] for name, other in stricter.items() if other in metrics}}


def _percent(value: float | None) -> str:
    return format_value(value, "percent")


def demo_verdict(summary: Mapping[str, Any]) -> str:
    """Two sentences that follow from `summary["methods"]`: what plain distillation did, and what CaOP did about it.

    They say so when the expected effect did not appear, and when a method needed to judge it was not run.
    """
    return f"{_distillation_sentence(summary)} {_repair_sentence(summary)}"


def _known(*values: float | None) -> bool:
    return all(value is not None for value in values)


def _distillation_sentence(summary: Mapping[str, Any]) -> str:
    base, opd = _method(summary, "base"), _method(summary, "opd")
    if base is None or opd is None:
        missing = " and ".join(name for name, method in (("base", base), ("opd", opd)) if method is None)
        return f"What plain on-policy distillation does cannot be judged, because {missing} was not run."
    needed = ("accuracy", "mean_confidence", "overconfidence_gap", "ece")
    if not _known(*(method.get(key) for method in (base, opd) for key in needed)):
        return "What plain on-policy distillation does cannot be judged: base or opd states no readable confidence."
    change = opd["accuracy"] - base["accuracy"]
    accuracy = f"from {_percent(base['accuracy'])} to {_percent(opd['accuracy'])}"
    confidence = f"from {_percent(base['mean_confidence'])} to {_percent(opd['mean_confidence'])}"
    error = f"from {base['ece']:.2f} to {opd['ece']:.2f}"
    if change > ACCURACY_CHANGE:
        what = f"made the model more accurate ({accuracy})"
    elif change < -ACCURACY_CHANGE:
        what = f"made the model less accurate ({accuracy})"
    else:
        what = f"left accuracy where it was ({accuracy})"
    worse_gap = opd["overconfidence_gap"] - base["overconfidence_gap"] > CALIBRATION_CHANGE
    worse_ece = opd["ece"] - base["ece"] > CALIBRATION_CHANGE
    if worse_gap and worse_ece and opd["overconfidence_gap"] > 0:
        link = "and" if change > ACCURACY_CHANGE else "but"
        blind = "blindly certain" if opd["mean_confidence"] > 0.95 else "overconfident"
        return (
            f"Plain on-policy distillation {what} {link} {blind}: the confidence it states rose {confidence}, "
            f"its calibration error (ECE) {error}."
        )
    return (
        f"The expected effect did not appear in this run: plain on-policy distillation {what} without making it "
        f"clearly more overconfident (stated confidence {confidence}, ECE {error})."
    )


def _repair_sentence(summary: Mapping[str, Any]) -> str:
    opd, caop = _method(summary, "opd"), _method(summary, "caop")
    if opd is None or caop is None:
        missing = " and ".join(name for name, method in (("opd", opd), ("caop", caop)) if method is None)
        return f"What CaOP changes cannot be judged, because {missing} was not run."
    if not _known(*(method.get(key) for method in (opd, caop) for key in ("accuracy", "mean_confidence", "ece"))):
        return "What CaOP changes cannot be judged, because opd or caop states no readable confidence."
    expected = (caop.get("expected") or {}).get("ece")
    readings = f"{caop['ece']:.2f} by the confidence it writes"
    if expected is not None:
        readings += f", {expected:.2f} by the expected value of its confidence distribution"
    base = _method(summary, "base")
    before = f" (base {base['ece']:.2f})" if base and _known(base.get("ece")) else ""
    ranking = ""
    if _known(caop.get("auroc"), opd.get("auroc")):
        ranking = f", and AUROC {caop['auroc']:.2f} against {opd['auroc']:.2f} in telling right answers from wrong ones"
    numbers = (
        f"{_percent(caop['accuracy'])} right against {_percent(opd['accuracy'])}, "
        f"stating {_percent(caop['mean_confidence'])}; ECE {readings}, against {opd['ece']:.2f}{before}{ranking}"
    )
    cost = opd["accuracy"] - caop["accuracy"]
    # judged by the sampled reading, the stricter of the two: the effect must not depend on how the confidence is read
    honest = opd["ece"] - caop["ece"] > CALIBRATION_CHANGE
    if honest and cost <= ACCURACY_CHANGE:
        kept = "beats its accuracy" if cost < -ACCURACY_CHANGE else "keeps that accuracy"
        return f"CaOP {kept} and takes the overconfidence away: {numbers}."
    if honest:
        return f"CaOP takes the overconfidence away but loses accuracy in this run: {numbers}."
    kept = "and loses accuracy" if cost > ACCURACY_CHANGE else "though it keeps the accuracy"
    return f"CaOP did not clearly lower the calibration error in this run, {kept}: {numbers}."


READINGS = (
    (None, "sampled: the confidence the model writes"),
    ("expected", "expected value: the mean of its confidence distribution, same answers"),
    ("greedy", "greedy decoding: the most likely answer and confidence"),
)


def _readings(summary: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows) per reading that at least one method has."""
    methods = summary["methods"]
    tables = []
    for key, title in READINGS:
        metrics = [method if key is None else method.get(key) for method in methods]
        metrics = [_judged(m) if m else None for m in metrics]
        if any(metrics):
            columns = CALIBRATION_KEYS + (ENTROPY_KEYS if key is None else ())
            if any(m and m.get("n_unparsed") for m in metrics):
                columns += ("n_unparsed",)
            tables.append((title, *metric_rows([method["name"] for method in methods], metrics, columns)))
    return tables


def demo_table(summary: Mapping[str, Any]) -> str:
    """The methods of `summary` as tables for the terminal: sampled, expected-value and greedy reading where known."""
    return "\n\n".join(format_table(heads, rows, title=title) for title, heads, rows in _readings(summary))


def demo_page(
    summary: Mapping[str, Any],
    answers: HeldOut,
    out: str | os.PathLike[str],
    *,
    examples: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
) -> Path:
    """Write `out`/demo.html, and with matplotlib reliability and history as .svg and .png; return the page's path.

    summary: {"task", "seed", "seconds", "methods": [...], "history": [...]}, any number in it may be None.
    answers: method name -> (correct [n] in {0, 1}, confidence [n] in [0, 1] or NaN, expected [n] alike or None):
        held-out answers of each method, the confidence they state and the mean of the confidence distribution.
    examples: some prompts to show, each {"prompt": str, "reference": str, "answers": {method: {"answer": str,
        "correct": bool, "confidence": float | None}}}; all of it is escaped.
    command: what the user typed, to be shown; made up from task and seed when None.
    """
    out = Path(out)
    names = [method["name"] for method in summary["methods"]]
    history = summary.get("history") or []
    colors = plots.model_colors([*names, *(record["method"] for record in history)])
    sampled, expected = [], []
    for name in names:
        if name in answers:
            correct, stated, mean = answers[name]
            sampled.append(ModelAnswers(name, Answers(correct, stated)))
            if mean is not None:
                expected.append(ModelAnswers(name, Answers(correct, mean)))
    reason = plots.plots_unavailable()
    if reason is None:
        if sampled:
            _save(out, "reliability", plots.reliability_diagram(sampled, colors=colors))
        if expected:
            _save(out, "reliability-expected", plots.reliability_diagram(expected, colors=colors))
        if history:
            _save(out, "history", plots.history_plot(history, colors=colors))
    n = max((len(method.correct) for method in sampled), default=0)
    measured = [f"Measured on {n:,} held-out prompts that no training step has seen."] if n else []
    sections = [
        page.Section("What this is", _introduction(summary, colors)),
        *_plot_sections(sampled, expected, history, colors, reason),
        page.Section(
            "The numbers",
            [
                *measured,
                *_tables(summary, colors),
                page.paragraph(UNREAD, note=True),
                page.glossary((*CALIBRATION_KEYS[1:], *ENTROPY_KEYS, "n_unparsed")),
            ],
        ),
        *([page.Section("Some answers", [_examples(examples, names, colors)])] if examples else []),
        page.Section("Limitations", [page.bullets(_limits(summary, sampled))]),
        page.Section("Reproduce", _recipe(summary, command)),
    ]
    return page.write_page(
        out / PAGE_NAME,
        title="Does the model know what it knows?",
        lead=demo_verdict(summary),
        sections=sections,
    )


def _save(out: Path, name: str, figure: Any) -> None:
    write_atomic(out / f"{name}.svg", plots.to_svg(figure))
    write_atomic(out / f"{name}.png", plots.to_png(figure))


def _introduction(summary: Mapping[str, Any], colors: Mapping[str, str]) -> list[str]:
    task = {
        "pronounce": "turn the spelling of an English word into its sounds (phonemes)",
        "sums": "add two numbers whose digits are partly smudged",
    }.get(summary["task"], f"the task “{summary['task']}”")
    names = [method["name"] for method in summary["methods"]]
    return [
        f"A small language model learns to {task} and to say after each answer how sure it is."
        if summary["task"] in ("pronounce", "sums")
        else f"A small language model learns {task} and says after each answer how sure it is.",
        "On-policy distillation: the model writes answers, a teacher (the same model, shown the solution) scores every "
        "token, and the model learns from the scores. The teacher is sure because it has seen the solution; the model "
        "learns to sound as sure without having seen it.",
        "CaOP lets the model answer each question several times, checks the answers, and teaches it to state the share "
        "that was right.",
        page.bullets(
            [
                page.join([page.dotted(name, colors[name]), f": {METHOD_MEANINGS[name]}"])
                for name in names
                if name in METHOD_MEANINGS
            ]
        ),
    ]


def _plot_sections(
    sampled: Sequence[ModelAnswers],
    expected: Sequence[ModelAnswers],
    history: Sequence[Mapping[str, Any]],
    colors: Mapping[str, str],
    reason: str | None,
) -> list[page.Section]:
    if reason:
        return [page.Section("Pictures", [reason])]
    sections = []
    if sampled:
        how = (
            "Each dot stands for the answers given with about that confidence. On the dashed line the model is honest: "
            "of the answers it gives at 70 %, 70 % are right. Below the line it is overconfident; red marks the "
            "distance. Thin bars are 95 % intervals, pale marks stand for less than 1 % of the answers, and the strip "
            "below shows how often each confidence is stated."
        )
        sections.append(
            page.Section("What it says, and how often it is right", [how, page.reliability_gallery(sampled, colors)])
        )
    if expected:
        why = (
            "The same answers, with the confidence read as the mean of the model's distribution over confidence values "
            "instead of the one value it happened to write."
        )
        sections.append(page.Section("The same by expected value", [why, page.reliability_gallery(expected, colors)]))
    if sampled or history:
        figures = []

        def drawn(panel: str) -> Callable[[str], Figure]:
            return lambda theme: plots.history_plot(history, panels=(panel,), theme=theme, colors=colors)

        if history:
            figures += [
                page.themed_image(drawn(panel), alt=alt)
                for panel, alt in (
                    ("gap", "Overconfidence gap against training steps, one line per method"),
                    ("claim", "Accuracy and mean confidence against training steps, one line per method"),
                )
            ]
        if sampled:
            figures.append(
                page.themed_image(
                    lambda theme: plots.risk_coverage_plot(expected or sampled, theme=theme, colors=colors),
                    alt="Error rate among the most confident answers against the share kept, one line per method",
                    caption=f"By {'the expected value' if expected else 'the stated confidence'}. A line that falls to "
                    "the left: the confidence tells which answers to trust.",
                )
            )
        words = _history_words(history)
        sections.append(
            page.Section("How it comes about, and what it is good for", [*words, page.gallery(figures, wide=True)])
        )
    return sections


def _history_words(history: Sequence[Mapping[str, Any]]) -> list[str]:
    gaps = [(r["step"], r["gap"]) for r in history if r["method"] == "opd" and r.get("gap") is not None]
    if len(gaps) < 2:
        return []
    (first, start), (last, end) = min(gaps), max(gaps)
    peak_step, peak = max(gaps, key=lambda pair: pair[1])
    if peak - start <= CALIBRATION_CHANGE:
        return [f"Under plain distillation the gap stays near {start:+.2f} from step {first} to {last}."]
    words = f"Under plain distillation the gap grows from {start:+.2f} to {peak:+.2f} by step {peak_step}"
    if peak - end > 0.01:
        words += f" and is {end:+.2f} at step {last}: once confidence is saturated, only accuracy can still move"
    return [words + "."]


def _tables(summary: Mapping[str, Any], colors: Mapping[str, str]) -> list[page.Html]:
    return [
        page.table(heads, [[page.dotted(row[0], colors[row[0]]), *row[1:]] for row in rows], caption=title)
        for title, heads, rows in _readings(summary)
    ]


def _examples(examples: Sequence[Mapping[str, Any]], names: Sequence[str], colors: Mapping[str, str]) -> page.Html:
    shown = [name for name in names if any(name in example["answers"] for example in examples)]
    rows = []
    for example in examples:
        cells: list[str] = [example["prompt"], example.get("reference") or "–"]
        for name in shown:
            answer = example["answers"].get(name)
            if answer is None:
                cells.append("–")
                continue
            confidence = answer.get("confidence")
            stated = "no confidence" if confidence is None else f"says {100 * confidence:.0f} %"
            verdict = page.marked("✓ right" if answer["correct"] else "✗ wrong", "good" if answer["correct"] else "bad")
            cells.append(page.stacked(answer["answer"], page.join([verdict, f", {stated}"])))
        rows.append(cells)
    heads = ["prompt", "reference", *(page.dotted(name, colors[name]) for name in shown)]
    return page.table(heads, rows, words=True)


def _limits(summary: Mapping[str, Any], sampled: Sequence[ModelAnswers]) -> list[str]:
    k = summary.get("rollouts_per_prompt")
    rollouts = f"{k} rollouts" if k else "a handful of rollouts"
    limits = [
        "The confidence a model writes is one draw from its distribution. The success rate it learns from comes from "
        f"{rollouts} per prompt and carries their noise, and the model learns that noise too: sampled confidences "
        "scatter around the right level, so their ECE stays above that of the expected value even when the model is "
        "calibrated. More rollouts per prompt narrow the scatter.",
        "Success rates are measured on sampled answers. Greedy answers are right at another rate, so a confidence that "
        "is honest for sampling is off for greedy decoding by that difference (see the greedy table).",
        "A constant confidence equal to the accuracy has no gap and almost no ECE, and tells nobody which answers to "
        "trust. Only SPR, AUROC and Brier show whether it does.",
    ]
    by_name = {method.name: method for method in sampled}
    if "caop" in by_name:
        method = by_name["caop"]
        constant = constant_baseline(method.correct)
        floor = ece_floor(method.confidence)
        if constant.get("brier") is not None and floor is not None:
            limits[-1] += (
                f" Always stating CaOP's accuracy would score Brier {constant['brier']:.3f} and AUROC 0.5 here; a "
                f"perfectly calibrated model with CaOP's confidences would still measure an ECE of about "
                f"{floor['mean']:.3f} on {len(method.correct):,} answers."
            )
    masked, caop = _method(summary, "masked"), _method(summary, "caop")
    if masked and caop and _known(masked.get("ece"), caop.get("ece")):
        text = "The control “masked” takes no loss on the confidence value at all: compare CaOP with it, too. "
        text += f"Its sampled ECE is {masked['ece']:.3f} against CaOP's {caop['ece']:.3f}"
        by_mean = [(method.get("expected") or {}).get("ece") for method in (masked, caop)]
        if _known(*by_mean):
            text += f", by the expected value {by_mean[0]:.3f} against {by_mean[1]:.3f}"
        limits.append(text + ".")
    limits.append(
        "One small model, one seed, one task. The numbers move from seed to seed, and none of this says how a large "
        "model would behave."
    )
    return limits


def _recipe(summary: Mapping[str, Any], command: str | None) -> list[str]:
    command = command or f"caop-fast demo --task {summary['task']} --seed {summary['seed']}"
    seconds = summary.get("seconds")
    took = (
        ""
        if seconds is None
        else f" It took {seconds / 60:.1f} minutes."
        if seconds >= 90
        else f" It took {seconds:.0f} s."
    )
    return [page.code(command), page.paragraph(f"Seed {summary['seed']}.{took} All numbers: summary.json", note=True)]
