"""What the project promised itself, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.groups import OURS, REFERENCE, Group, groups, largest_common, reference, shape
from benchmarks.records import Record, Results
from benchmarks.tables import error, escape, listed, number, over, percent, times

GEMMS = 1.3  # of the bare products' time, at most
FASTER = 1.5  # than the fastest peer of equal accuracy, at least
ACCURACY = 2.0  # times our gradient error, or LEAST: still called equal
LEAST = 1e-6
MEMORY = 1 / 8  # of the official loss's, at most
COPY = 0.8  # of the rate of a large copy, at least
OFFICIAL = "official"
MINIMAL = "caop_fast-min"


@dataclass(frozen=True)
class Target:
    """One target on one device.

    Attributes:
        what: is measured.
        required: in words.
        at: the case, in words.
        measured: in words; None where it was not.
        met: None where it was not measured.
        note: why it was not measured, or what else there is to know.
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
    """All four on a GPU; on a CPU the two that compare implementations, at the largest case they share."""
    found = groups(results.records)
    linear = [g for g in found if g.suite == "linear"]
    logits = [g for g in found if g.suite == "logits"]
    if results.header.get("device_type") == "cpu":
        common = largest_common(linear)
        return [faster(linear, common), memory(linear, common)] if common is not None else []
    at = reference(linear)
    copied = (results.header.get("ceilings") or {}).get("copy_gbps")
    return [
        bare_gemms(linear, at),
        faster(linear, at),
        memory(linear, at),
        bandwidth(logits, reference(logits), copied),
    ]


def bare_gemms(found: Sequence[Group], at: Group | None) -> Target:
    """Time of the linear loss over that of its bare matrix products."""
    target = Target("linear loss, time over that of its bare GEMMs", f"at most {GEMMS:g}x")
    target, ours = _ours(target, at)
    if ours is None:
        return target
    ratio = _floors(ours)
    if ratio is None:
        return replace(target, note="the time of its bare GEMMs was not recorded")
    rest = [(r, g) for g in found if (record := g.ok(OURS)) and (r := _floors(record)) is not None]
    note = _over_all(rest, GEMMS, at_most=True)
    return replace(target, measured=times(ratio, 4), met=ratio <= GEMMS, note=note)


def _floors(record: Record) -> float | None:
    return over(record.time_ms, record.floor_ms) if record.floor == "gemms" else None


def faster(found: Sequence[Group], at: Group | None) -> Target:
    """Speed against the fastest peer of equal accuracy."""
    target = Target("linear loss, speed against the fastest peer of equal accuracy", f"at least {FASTER:g}x")
    target, ours = _ours(target, at)
    if ours is None:
        return target
    if ours.grad_error is None:
        return replace(target, note=f"the gradient error of {OURS} was not recorded")
    peer = fastest_equal(at)
    if peer is None:
        return replace(target, note=f"no peer of equal accuracy was measured: {_others(at)}")
    speed = peer.time_ms / ours.time_ms
    notes = [f"the fastest is {escape(peer.impl)}, gradient error {error(peer.grad_error)}"]
    notes[0] += f" against {error(ours.grad_error)}"
    loose = min(at.peers, key=lambda r: (r.time_ms, r.impl))
    if loose.time_ms < peer.time_ms:
        rough = f"gradient error {error(loose.grad_error)}"
        notes.append(f"of any accuracy {escape(loose.impl)}: {times(loose.time_ms / ours.time_ms)}, {rough}")
    rest = [(other.time_ms / g.ok(OURS).time_ms, g) for g in found if (other := fastest_equal(g)) is not None]
    notes.append(_over_all(rest, FASTER, at_most=False))
    return replace(target, measured=times(speed, 4), met=speed >= FASTER, note="; ".join(filter(None, notes)))


def fastest_equal(group: Group) -> Record | None:
    """The fastest peer whose gradient error is at most twice that of caop_fast, or 1e-6."""
    ours = group.ok(OURS)
    if ours is None or ours.grad_error is None:
        return None
    allowed = max(ACCURACY * ours.grad_error, LEAST)
    able = [r for r in group.peers if r.grad_error is not None and r.grad_error <= allowed]
    return min(able, key=lambda r: (r.time_ms, r.impl), default=None)


def memory(found: Sequence[Group], at: Group | None) -> Target:
    """Peak memory beyond the inputs against that of the official loss."""
    target = Target(f"linear loss, memory beyond the inputs over that of `{OFFICIAL}`", f"at most {number(MEMORY)}x")
    target, ours = _ours(target, at)
    if ours is None:
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
    """Rate at which the loss on logits moves its bytes, against that of a large copy."""
    target = Target("loss on logits, bytes moved per second over those of a large copy", f"at least {percent(COPY)}")
    target, ours = _ours(target, at)
    if ours is None:
        return target
    if not copied:
        return replace(target, note="the rate of a large copy was not recorded")
    if ours.traffic_gbps is None:
        return replace(target, note="the bytes it moves were not recorded")
    share = ours.traffic_gbps / copied
    own = [(record, g) for g in found if (record := g.ok(OURS)) is not None]
    rest = [(record.traffic_gbps / copied, g) for record, g in own if record.traffic_gbps is not None]
    note = _over_all(rest, COPY, at_most=False, form=percent)
    return replace(target, measured=f"{100 * share:.1f} %", met=share >= COPY, note=note)


def _ours(target: Target, at: Group | None) -> tuple[Target, Record | None]:
    """The target at a case, and caop_fast's record there; without one the target says why."""
    if at is None:
        model, n = REFERENCE
        return replace(target, at=f"{model}, N {n}, bfloat16", note="the case is not in the records"), None
    target = replace(target, at=escape(shape(at)))
    ours = at.ok(OURS)
    if ours is None:
        record = at.records.get(OURS)
        return replace(target, note=f"{OURS} {'was not run' if record is None else _failure(record)}"), None
    return target, ours


def _failure(record: Record) -> str:
    if record.status == "ok":
        return "has no recorded time"
    return escape(record.status if record.reason is None else f"{record.status} ({record.reason})")


def _others(at: Group) -> str:
    """What became of the peers of a case."""
    ok = {record.impl for record in at.peers}
    words = [f"{escape(r.impl)} has gradient error {error(r.grad_error)}" for r in at.peers]
    rest = [r for r in at.records.values() if not r.impl.startswith(OURS) and r.impl not in ok]
    return listed([*words, *(f"{escape(r.impl)} {r.status}" for r in rest)]) or "none was run"


def _over_all(values: Sequence[tuple[float, Group]], bound: float, *, at_most: bool, form=times) -> str:
    """Range over all cases of the suite, the worst of them, and in how many the bound is kept."""
    if len(values) < 2:
        return ""
    numbers = [v for v, _ in values]
    kept = sum(v <= bound if at_most else v >= bound for v in numbers)
    worst = (max if at_most else min)(values, key=lambda item: item[0])[1]
    ends = f"{form(min(numbers))} to {form(max(numbers))}, worst in {escape(worst.case)}"
    return f"over the {len(values)} cases of the suite where it is known: {ends}; kept in {kept}"
