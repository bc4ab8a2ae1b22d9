"""The parts of the report that show the records of one suite."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks.records import OURS, Record, Shape
from benchmarks.report.groups import (
    Group,
    by,
    described,
    dtype_order,
    impl_order,
    impls,
    largest_common,
    setting,
    target_case,
)
from benchmarks.report.tables import (
    NOTHING,
    cut,
    error,
    escape,
    listed,
    number,
    over,
    percent,
    size,
    spread,
    spread_of,
    table,
    times,
)

ROWS = 40  # of a table, if it can be split by settings
STATUSES = ("ok", "skipped", "oom", "wrong", "error", "crashed")
SPLITS = ("rollout", "teacher", "student", "loss", "optimiser")

Cell = Callable[[Record, Record | None], str]  # from a record and that of caop_fast


def summary(found: Sequence[Group]) -> list[str]:
    """All cases of a suite in one table, and the most interesting ones in detail."""
    return overview(found) + [line for case in details(found) for line in detail(case)]


def every_case(found: Sequence[Group]) -> list[str]:
    """Time and memory of every case that is not already shown in detail."""
    closely = details(found)
    known = [g for g in found if g.shape.n is not None]  # the others have only a reason
    shapes = {g.shape.model: (g.shape.v, g.shape.h) for g in known}
    same = all(shapes[g.shape.model] == (g.shape.v, g.shape.h) for g in known)
    named = same and len(shapes) > 1  # the model implies V and H
    lines = []
    for title, cell in (("Time, ms", _time), ("Peak memory beyond the inputs", _memory)):
        for part in parts(known):
            if not all(g in closely for g in part):
                lines += across(part, title, cell, named=named)
    if lines and named:
        models = listed(_shape_of(model, *shapes[model]) for model in sorted(shapes, key=str))
        return [f"Every case: {models}.", "", *lines]
    return lines


def overview(found: Sequence[Group]) -> list[str]:
    """A row for each implementation and dtype: the statuses of its cases, and how it compares over all of them."""
    rows = []
    for dtype, same in sorted(by(found, lambda g: g.shape.dtype).items(), key=lambda item: dtype_order(item[0])):
        for impl in impls(same):
            pairs = [(record, g.ok(OURS)) for g in same if (record := g.ok(impl)) is not None]
            if impl == OURS:
                ratios, memory = [], []
            else:
                ratios = [r for own, ours in pairs if ours and (r := over(own.time_ms, ours.time_ms)) is not None]
                memory = [r for own, ours in pairs if ours and (r := over(own.peak_bytes, ours.peak_bytes)) is not None]
            count = Counter(g.records[impl].status for g in same if impl in g.records)
            fate = [f"{count[s]} {s}" for s in sorted(count, key=_status_order)]
            losses = [r.loss_error for r, _ in pairs if r.loss_error is not None]
            gradients = [r.grad_error for r, _ in pairs if r.grad_error is not None]
            errors = [error(max(losses, default=None)), error(max(gradients, default=None))]
            gives = next((r.gives for r, _ in pairs if r.gives), None)
            what = NOTHING if gives is None else escape(gives)
            rows.append(
                [escape(impl), dtype or NOTHING, what, listed(fate), spread_of(ratios), spread_of(memory), *errors]
            )
    headers = ["implementation", "dtype", "returns", "cases", "relative time", "relative memory"]
    return table([*headers, "largest loss error", "largest gradient error"], rows, left=4)


def parts(found: Sequence[Group]) -> list[list[Group]]:
    """The cases of a suite split into tables by dtype, and by further settings while one is too long."""
    keys = ("dtype", "beta", "head_trained", "masked", "model")
    made: list[list[Group]] = []
    for count in range(1, len(keys) + 1):
        made = list(by(found, _fields(keys[:count])).values())
        if all(len(part) <= ROWS for part in made):
            break
    return made


def _fields(names: Sequence[str]) -> Callable[[Group], tuple[object, ...]]:
    return lambda group: tuple(getattr(group.shape, name) for name in names)


def across(found: Sequence[Group], title: str, cell: Cell, *, named: bool = False) -> list[str]:
    """A row for each case, a column for each implementation that did not skip all; what all cases share is above.

    ``named``: the model implies V and H.
    """
    tried = {r.impl for g in found for r in g.records.values() if r.status != "skipped"}
    able = [impl for impl in impls(found) if impl in tried]
    if not able:
        return []
    caption, headers, labels = layout(found, named=named)
    rows = []
    for group, label in zip(found, labels, strict=True):
        cells = (_cell(group.records.get(impl), group.ok(OURS), cell) for impl in able)
        rows.append([*label, *cells])
    return [
        f"{title}: {caption}." if caption else f"{title}.",
        "",
        *table([*headers, *map(escape, able)], rows, left=len(headers)),
    ]


def layout(found: Sequence[Group], *, named: bool) -> tuple[str, list[str], list[list[str]]]:
    """What all cases share in words, the headers of the other columns, and these columns of every case."""
    columns: dict[str, Callable[[Group], str]] = {
        "model": lambda g: escape(g.shape.model or g.case),
        "N": lambda g: _whole(g.shape.n),
        "V": lambda g: _whole(g.shape.v),
        "H": lambda g: _whole(g.shape.h),
        "dtype": lambda g: g.shape.dtype or NOTHING,
        "beta": lambda g: NOTHING if g.shape.beta is None else f"{g.shape.beta:g}",
        "head": lambda g: {None: NOTHING, True: "trained", False: "frozen"}[g.shape.head_trained],
        "masked": lambda g: f"{100 * g.shape.masked:.0f} %",
    }
    if named:
        del columns["V"], columns["H"]
    vary = [name for name, column in columns.items() if len({column(g) for g in found}) > 1]
    vary = vary or ["model"]
    fixed = [name for name in columns if name not in vary]
    first = found[0]
    words = [escape(first.shape.model or first.case)] if "model" in fixed else []
    sizes = [name for name in ("N", "V", "H") if name in fixed and getattr(first.shape, name.lower()) is not None]
    words += [f"{name} {columns[name](first)}" for name in sizes]
    shared = Shape(
        dtype=first.shape.dtype if "dtype" in fixed else None,
        beta=first.shape.beta if "beta" in fixed else None,
        head_trained=first.shape.head_trained if "head" in fixed else None,
        masked=first.shape.masked if "masked" in fixed else 0.0,
    )
    words += setting(shared)
    return listed(words), vary, [[columns[name](g) for name in vary] for g in found]


def _shape_of(model: str | None, v: int | None, h: int | None) -> str:
    sizes = [f"{name} {value}" for name, value in (("V", v), ("H", h)) if value is not None]
    return f"{escape(model)} ({' x '.join(sizes)})" if model and sizes else ""


def _whole(value: int | None) -> str:
    return NOTHING if value is None else str(value)


def _cell(record: Record | None, ours: Record | None, cell: Cell) -> str:
    if record is None:
        return NOTHING
    return cell(record, ours) if record.status == "ok" else record.status


def _beside(text: str, record: Record, value: float | None, ours: float | None) -> str:
    ratio = over(value, ours)
    return text if record.impl == OURS or ratio is None else f"{text} ({times(ratio)})"


def _time(record: Record, ours: Record | None) -> str:
    return _beside(number(record.time_ms), record, record.time_ms, ours.time_ms if ours else None)


def _memory(record: Record, ours: Record | None) -> str:
    return _beside(size(record.peak_bytes), record, record.peak_bytes, ours.peak_bytes if ours else None)


def details(found: Sequence[Group]) -> list[Group]:
    """For each dtype the case of the targets and the largest case that most implementations have in common."""
    chosen: list[Group] = []
    for dtype, same in sorted(by(found, lambda g: g.shape.dtype).items(), key=lambda item: dtype_order(item[0])):
        for group in (target_case(same, dtype), largest_common(same)):
            if group is not None and group not in chosen:
                chosen.append(group)
    return chosen


def detail(group: Group) -> list[str]:
    """All that was measured on one case, a row for each implementation."""
    ours = group.ok(OURS)
    records = [r for r in group.records.values() if r.status != "skipped"]
    moved = any(r.traffic_gbps is not None for r in records)
    unit = "TFLOP/s" if any(r.tflops is not None for r in records) else "GB/s"
    floor = next((f"{r.floor} {number(r.floor_ms)} ms" for r in records if r.floor_ms and r.floor), "not measured")
    rows = []
    for r in records:
        rate = number(r.tflops if unit == "TFLOP/s" else r.gbps)
        own = ours if ours is not None and r.impl != OURS else None
        row = [
            spread(r.time_ms, r.time_low_ms, r.time_high_ms, r.rounds) if r.status == "ok" else r.status,
            times(over(r.time_ms, own.time_ms)) if own else NOTHING,
            percent(over(r.floor_ms, r.time_ms)),
            rate,
            *([number(r.traffic_gbps)] if moved else []),
            size(r.peak_bytes),
            times(over(r.peak_bytes, own.peak_bytes)) if own else NOTHING,
            error(r.loss_error),
            error(r.grad_error),
        ]
        rows.append([escape(r.impl), NOTHING if r.gives is None else escape(r.gives), *row])
    headers = ["implementation", "returns", "time, ms", "relative", "floor/time", unit]
    headers += ["memory GB/s"] if moved else []
    headers += ["memory", "relative", "loss error", "gradient error"]
    return [f"In detail: {escape(described(group))}; floor: {floor}.", "", *table(headers, rows, left=2)]


def reasons(found: Sequence[Group]) -> list[str]:
    """Why cells have a word instead of a number: each reason once, with implementations and counts."""
    records = [r for g in found for r in g.records.values() if r.status != "ok"]
    if not records:
        return []
    lines = ["Not measured:", ""]
    same = by(records, lambda r: (r.status, re.sub(r"[\d.]+(e[+-]?\d+)?", "#", r.reason or "")))
    for (status, _), rest in sorted(same.items(), key=lambda item: (_status_order(item[0][0]), item[0][1])):
        count = Counter(r.impl for r in rest)
        who = listed(f"{escape(impl)} ({count[impl]})" for impl in sorted(count, key=impl_order))
        texts = sorted({r.reason or "no reason recorded" for r in rest})
        text = escape(cut(texts[0])) + (f" (and {len(texts) - 1} like it)" if len(texts) > 1 else "")
        where = f" on {escape(rest[0].case)}" if len(rest) == 1 else ""
        lines.append(f"- {status}: {text}: {who}{where}")
    return [*lines, ""]


def _status_order(status: str) -> int:
    return STATUSES.index(status) if status in STATUSES else len(STATUSES)


def step(found: Sequence[Group]) -> list[str]:
    """Training steps: tokens per second, the time of each stage, and the number of layers."""
    lines = []
    for group in found:
        records = [r for r in group.records.values() if r.status != "skipped"]
        ok = [r for r in records if r.status == "ok"]
        spent = {name: None for r in ok for name in (r.extra.get("split_ms") or {})}
        names = sorted(spent, key=lambda name: SPLITS.index(name) if name in SPLITS else len(SPLITS))
        ours = next((r.extra.get("tokens_per_s") for r in ok if r.impl == OURS), None)
        rows = [_step_row(r, names, ours) for r in records]
        if not rows:
            continue
        headers = ["implementation", "tokens/s", "relative", "tokens/s without rollout", "step, ms"]
        headers += [*(f"{escape(n)}, ms" for n in names), "memory", "loss error", "gradient error"]
        lines += [f"{escape(group.case)}: {_layers(ok or records)}.", "", *table(headers, rows)]
    return lines


def _step_row(record: Record, names: Sequence[str], ours: float | None) -> list[str]:
    if record.status != "ok":
        return [escape(record.impl), record.status, *[NOTHING] * (len(names) + 6)]
    split = record.extra.get("split_ms") or {}
    whole = record.time_ms or sum(v for v in split.values() if v is not None)
    speed = record.extra.get("tokens_per_s")
    cells = []
    for name in names:
        part = over(split.get(name), whole)
        cells.append(number(split.get(name)) + (f" ({percent(part)})" if part is not None else ""))
    relative = NOTHING if record.impl == OURS else times(over(speed, ours))
    after = number(record.extra.get("tokens_per_s_without_rollout"), 4)
    time = spread(record.time_ms, record.time_low_ms, record.time_high_ms, record.rounds)
    errors = [error(record.loss_error), error(record.grad_error)]
    return [escape(record.impl), number(speed, 4), relative, after, time, *cells, size(record.peak_bytes), *errors]


def _layers(records: Sequence[Record]) -> str:
    """The number of layers relative to the published model, and the number of tokens per step."""

    def values(name: str) -> list[str]:
        return sorted({str(r.extra[name]) for r in records if r.extra.get(name) is not None})

    used, published = values("layers"), values("layers_published")
    prompts, rollouts, tokens = values("prompts"), values("rollouts"), values("tokens")
    whole = " or ".join(published) or "an unknown number of"
    words = [f"{' or '.join(used)} of {whole} published layers"] if used else []
    words += (
        [f"{' or '.join(prompts)} prompts with {' or '.join(rollouts)} rollouts each"] if prompts and rollouts else []
    )
    words += [f"{' or '.join(tokens)} tokens per step"] if tokens else []
    words += [f"optimizer {escape(name)}" for name in values("optimiser")]
    return listed(words) or "its layers are not known"
