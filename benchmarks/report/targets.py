"""The project's performance targets and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from benchmarks.records import OURS, Record, Results
from benchmarks.report.groups import TARGET, Group, described, groups, largest_common, target_case
from benchmarks.report.tables import error, escape, listed, number, over, percent, times

GEMMS = 1.3  # times the time of the matrix products alone, at most
FASTER = 1.5  # times the speed of the fastest peer of equal accuracy, at least
ACCURACY = 2.0  # times our gradient error, or LEAST: counts as equal
LEAST = 1e-6
MEMORY = 1 / 8  # of that of the official loss, at most
COPY = 0.8  # of the bandwidth of a large copy, at least
OFFICIAL = "official"
MINIMAL = "caop_fast-min"


@dataclass(frozen=True)
class Target:
    """One target on one device.

    Attributes:
        what: is measured.
        required: in words.
        at: the case, in words.
        measured: in words; None if it was not.
        met: None if it was not measured.
        note: why it was not measured, or further details.
    """

    what: str
    required: str
    at: str = ""
    measured: str | None = None
    met: bool | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        return "not measured" if self.met is None else "met" if self.met else "**not met**"


def targets(results: Results) -> list[Target]:
    """All four on a GPU; on a CPU the two that compare implementations, at the largest common case."""
    found = groups(results.records)
    linear = [g for g in found if g.suite == "linear"]
    logits = [g for g in found if g.suite == "logits"]
    if results.header.get("device_type") == "cpu":
        common = largest_common(linear)
        return [faster(linear, common), memory(linear, common)] if common is not None else []
    at = target_case(linear)
    copied = (results.header.get("ceilings") or {}).get("copy_gbps")
    return [
        bare_gemms(linear, at),
        faster(linear, at),
        memory(linear, at),
        bandwidth(logits, target_case(logits), copied),
    ]


def bare_gemms(found: Sequence[Group], at: Group | None) -> Target:
    """Time of the linear loss relative to its matrix products alone."""
    target = Target("linear loss, time relative to its matrix products alone", f"at most {GEMMS:g}x")
    target, _, ours = _ours(target, at)
    if ours is None:
        return target
    ratio = _floors(ours)
    if ratio is None:
        return replace(target, note="the time of the matrix products was not recorded")
    rest = [(r, g) for g in found if (record := g.ok(OURS)) and (r := _floors(record)) is not None]
    note = _over_all(rest, GEMMS, at_most=True)
    return replace(target, measured=times(ratio, 4), met=ratio <= GEMMS, note=note)


def _floors(record: Record) -> float | None:
    return over(record.time_ms, record.floor_ms) if record.floor == "gemms" else None


def faster(found: Sequence[Group], at: Group | None) -> Target:
    """Speed relative to the fastest peer of equal accuracy."""
    target = Target("linear loss, speed relative to the fastest peer of equal accuracy", f"at least {FASTER:g}x")
    target, at, ours = _ours(target, at)
    if at is None or ours is None:
        return target
    if ours.grad_error is None:
        return replace(target, note=f"the gradient error of {OURS} was not recorded")
    peer = fastest_equal(at)
    if peer is None:
        return replace(target, note=f"no peer of equal accuracy was measured: {_others(at)}")
    speed = peer.ms / ours.ms
    notes = [f"the fastest is {escape(peer.impl)}, gradient error {error(peer.grad_error)}"]
    notes[0] += f" against {error(ours.grad_error)}"
    fastest = min(at.peers, key=lambda r: (r.ms, r.impl))
    if fastest.ms < peer.ms:
        rough = f"gradient error {error(fastest.grad_error)}"
        notes.append(f"of any accuracy {escape(fastest.impl)}: {times(fastest.ms / ours.ms)}, {rough}")
    pairs = [(g, g.ok(OURS), fastest_equal(g)) for g in found]
    rest = [(other.ms / own.ms, g) for g, own, other in pairs if own is not None and other is not None]
    notes.append(_over_all(rest, FASTER, at_most=False))
    return replace(target, measured=times(speed, 4), met=speed >= FASTER, note="; ".join(filter(None, notes)))


def fastest_equal(group: Group) -> Record | None:
    """The fastest peer whose gradient error is at most twice that of caop_fast, or 1e-6."""
    ours = group.ok(OURS)
    if ours is None or ours.grad_error is None:
        return None
    allowed = max(ACCURACY * ours.grad_error, LEAST)
    able = [r for r in group.peers if r.grad_error is not None and r.grad_error <= allowed]
    return min(able, key=lambda r: (r.ms, r.impl), default=None)


def memory(found: Sequence[Group], at: Group | None) -> Target:
    """Peak memory beyond the inputs relative to the official loss."""
    target = Target(f"linear loss, memory beyond the inputs relative to `{OFFICIAL}`", f"at most {number(MEMORY)}x")
    target, at, ours = _ours(target, at)
    if at is None or ours is None:
        return target
    everywhere = _over_all([(r, g) for g in found if (r := _share(g)) is not None], MEMORY, at_most=True)
    share = _share(at)
    if share is None:
        return replace(target, note="; ".join(filter(None, [_no_memory(at, ours), everywhere])))
    least = _share(at, MINIMAL)
    notes = [f"{MINIMAL}: {times(least)}" if least is not None else "", everywhere]
    return replace(target, measured=times(share, 4), met=share <= MEMORY, note="; ".join(filter(None, notes)))


def _share(group: Group, impl: str = OURS) -> float | None:
    own, official = group.ok(impl), group.ok(OFFICIAL)
    return over(own.peak_bytes, official.peak_bytes) if own is not None and official is not None else None


def _no_memory(at: Group, ours: Record) -> str:
    official = at.records.get(OFFICIAL)
    if official is None:
        return f"{OFFICIAL} was not run"
    if official.status != "ok":
        return f"{OFFICIAL}: {_failure(official)}"
    return f"the memory of {OURS if ours.peak_bytes is None else OFFICIAL} was not recorded"


def bandwidth(found: Sequence[Group], at: Group | None, copied: float | None) -> Target:
    """Memory bandwidth of the loss on logits relative to a large copy."""
    target = Target("loss on logits, memory bandwidth relative to a large copy", f"at least {percent(COPY)}")
    target, _, ours = _ours(target, at)
    if ours is None:
        return target
    if not copied:
        return replace(target, note="the bandwidth of a large copy was not recorded")
    if ours.traffic_gbps is None:
        return replace(target, note="the bytes it reads and writes were not recorded")
    share = ours.traffic_gbps / copied
    own = [(record, g) for g in found if (record := g.ok(OURS)) is not None]
    rest = [(record.traffic_gbps / copied, g) for record, g in own if record.traffic_gbps is not None]
    note = _over_all(rest, COPY, at_most=False, form=percent)
    return replace(target, measured=f"{100 * share:.1f} %", met=share >= COPY, note=note)


def _ours(target: Target, at: Group | None) -> tuple[Target, Group | None, Record | None]:
    """The target at a case, the case, and the record of caop_fast there; if there is none, the target says why."""
    if at is None:
        model, n = TARGET
        return replace(target, at=f"{model}, N {n}, bfloat16", note="the case is not in the records"), None, None
    target = replace(target, at=escape(described(at)))
    ours = at.ok(OURS)
    if ours is None:
        record = at.records.get(OURS)
        return replace(target, note=f"{OURS} {'was not run' if record is None else _failure(record)}"), at, None
    return target, at, ours


def _failure(record: Record) -> str:
    if record.status == "ok":
        return "has no recorded time"
    return escape(record.status if record.reason is None else f"{record.status} ({record.reason})")


def _others(at: Group) -> str:
    """Errors or statuses of the peers of a case."""
    ok = {record.impl for record in at.peers}
    words = [f"{escape(r.impl)} has gradient error {error(r.grad_error)}" for r in at.peers]
    rest = [r for r in at.records.values() if not r.impl.startswith(OURS) and r.impl not in ok]
    return listed([*words, *(f"{escape(r.impl)} {r.status}" for r in rest)]) or "none was run"


def _over_all(
    values: Sequence[tuple[float, Group]], bound: float, *, at_most: bool, form: Callable[[float], str] = times
) -> str:
    """Range over all cases of the suite, the worst case, and in how many the bound holds."""
    if len(values) < 2:
        return ""
    numbers = [v for v, _ in values]
    kept = sum(v <= bound if at_most else v >= bound for v in numbers)
    worst = (max if at_most else min)(values, key=lambda item: item[0])[1]
    ends = f"{form(min(numbers))} to {form(max(numbers))}, worst in {escape(worst.case)}"
    return f"over the {len(values)} cases of the suite where it is known: {ends}; met in {kept}"
