"""Targets, fits and plots of the benchmarks' report: each follows from the records, to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import growth, plots
from benchmarks.report.fits import chosen, fits, line, sweeps
from benchmarks.report.groups import groups
from benchmarks.report.targets import targets
from helpers.report_records import cells, changed, good, linear, logits, rendered, results


class TestTargets:
    def test_met_at_their_bounds(self) -> None:
        assert [(t.measured, t.met) for t in targets(results(*good()))] == [
            ("1.300x", True),
            ("1.500x", True),
            ("0.1250x", True),
            ("80.0 %", True),
        ]

    @pytest.mark.parametrize(
        ("which", "index", "change"),
        [
            (0, 0, {"time_ms": 10.41}),
            (1, 3, {"time_ms": 15.5}),
            (1, 4, {"grad_error": 8e-3}),  # the faster one becomes a peer of equal accuracy
            (2, 0, {"peak_bytes": 10**9 + 1000}),
            (3, 5, {"traffic_gbps": 2399.0}),
        ],
    )
    def test_not_met_just_beyond(self, which, index, change) -> None:
        records = good()
        records[index] = changed(records[index], **change)
        assert targets(results(*records))[which].met is False
        assert targets(results(*records))[which].verdict == "**not met**"

    def test_the_peer_is_named_and_our_variants_are_none(self) -> None:
        target = targets(results(*good()))[1]
        assert "the fastest is plain" in target.note
        assert "of any accuracy trl-chunked: 1.06x, gradient error 8.1e-03" in target.note
        assert "0.100x" not in target.note

    def test_accuracy_below_a_millionth_is_equal(self) -> None:
        records = [linear("caop_fast", grad_error=1e-9), linear("plain", time_ms=20.0, grad_error=1e-6)]
        assert targets(results(*records))[1].measured == "2.000x"
        records[1] = changed(records[1], grad_error=1.1e-6)
        assert targets(results(*records))[1].met is None

    def test_the_minimal_variant_is_beside_the_memory(self) -> None:
        assert targets(results(*good()))[2].note == "caop_fast-min: 0.0125x"

    def test_ranges_and_the_worst_case_over_the_suite(self) -> None:
        rest = [linear("caop_fast", 256, time_ms=16.0), linear("official", 256, time_ms=20.0, peak_bytes=10**9)]
        found = targets(results(*good(), *rest))
        assert "over the 2 cases" in found[0].note
        assert "1.30x to 2.00x, worst in Qwen3-8B N=256" in found[0].note
        assert found[0].note.endswith("met in 1")
        assert "1.25x to 1.50x, worst in Qwen3-8B N=256" in found[1].note
        assert "0.125x to 1.00x, worst in Qwen3-8B N=256" in found[2].note
        assert all(t.met for t in found), "the verdict is that of the case of the target"

    @pytest.mark.parametrize(
        ("change", "which", "reason"),
        [
            ({0: {"status": "oom", "reason": "out of memory"}}, 0, "caop_fast oom (out of memory)"),
            ({0: {"n": 4096}}, 0, "the case is not in the records"),
            ({0: {"floor_ms": None}}, 0, "the time of the matrix products was not recorded"),
            ({0: {"floor": "copy"}}, 0, "the time of the matrix products was not recorded"),
            ({0: {"grad_error": None}}, 1, "the gradient error of caop_fast was not recorded"),
            (
                {2: {"status": "oom"}, 3: {"grad_error": None}},
                1,
                "trl-chunked has gradient error 8.1e-03, official oom",
            ),
            ({2: {"status": "oom", "reason": None}}, 2, "official: oom"),
            ({2: {"status": "skipped", "reason": "a|b"}}, 2, r"official: skipped (a\|b)"),
            ({2: {"peak_bytes": None}}, 2, "the memory of official was not recorded"),
            ({5: {"traffic_gbps": None}}, 3, "the bytes it reads and writes were not recorded"),
        ],
    )
    def test_not_measured_says_why(self, change, which, reason) -> None:
        records = good()
        for index, fields in change.items():
            records[index] = changed(records[index], **fields)
        if any(fields.get("n") for fields in change.values()):
            records = [changed(r, n=4096) for r in records]
        target = targets(results(*records))[which]
        assert (target.met, target.verdict, target.measured) == (None, "not measured", None)
        assert reason in target.note

    def test_no_copy_no_bandwidth(self) -> None:
        assert targets(results(*good(), ceilings=None))[3].note == "the bandwidth of a large copy was not recorded"

    def test_a_frozen_head_a_mask_or_float32_is_another_case(self) -> None:
        for change in ({"head_trained": False}, {"masked": 0.4}, {"dtype": "float32"}):
            assert targets(results(linear("caop_fast", **change)))[0].met is None

    def test_on_a_cpu_two_at_the_largest_common_case(self) -> None:
        small = {"model": "small", "v": 1000, "h": 64, "dtype": "float32"}
        records = [linear(i, n, **small) for n in (64, 256) for i in ("caop_fast", "plain", "official")]
        records += [linear("caop_fast", 1024, **small)]
        text = rendered(*records, device="Xeon", kind="cpu")
        assert [t.at.split(", V")[0] for t in targets(results(*records, kind="cpu"))] == ["small, N 256"] * 2
        assert "Measured on a CPU." in text
        assert "no linear case" in rendered(logits("caop_fast"), kind="cpu")


class TestFits:
    @pytest.mark.parametrize(
        ("variable", "sizes"), [("n", (64, 128, 512)), ("v", (999, 5000, 7000)), ("h", (8, 64, 96))]
    )
    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
    def test_recover_a_power(self, variable, sizes, power) -> None:
        shape = {"model": "small", "v": 1000, "h": 64}
        records = [
            linear("caop_fast", **{**shape, variable: x}, time_ms=3.0 * x**power, peak_bytes=7 * x**power)
            for x in sizes
        ]
        found = fits(records)
        assert [(f.quantity, f.sweep.variable, f.low, f.high, f.points) for f in found] == [
            (quantity, variable, min(sizes), max(sizes), 3) for quantity in ("time", "memory")
        ]
        assert [f.exponent for f in found] == pytest.approx([power, power], abs=1e-9)

    def test_recover_a_line(self) -> None:
        records = [linear("caop_fast", n, time_ms=5 + 0.25 * n, peak_bytes=10**6 + 300 * n) for n in (64, 256, 1024)]
        time, memory = fits(records)
        assert (time.intercept, time.slope, time.r2) == pytest.approx((5, 0.25, 1))
        assert (memory.intercept, memory.slope, memory.r2) == pytest.approx((1e6, 300, 1))
        text = "\n".join(growth.growth(chosen(sweeps(groups(records))), 1))
        assert cells(text.splitlines()[4])[2:] == [
            *("caop_fast", "N 64–1024", "3", f"{time.exponent:.2f}", "5.00 ms", "250 µs/token", "1.000")
        ]
        assert "1.00 MB | 0.300 kB/token" in text

    def test_scatter_lowers_what_a_line_explains(self) -> None:
        assert line([1, 2, 3, 4], [1, 3, 2, 4])[2] == pytest.approx(0.64)
        assert line([1, 2, 3], [5, 5, 5]) == (5, 0, 1)

    def test_two_sizes_or_two_settings_are_no_fit(self) -> None:
        assert not fits([linear("caop_fast", n) for n in (64, 128)])
        same = [linear("caop_fast", n) for n in (64, 128, 256)]
        assert len(fits(same)) == 2
        settings = {
            "dtype": "float32",
            "beta": 1.0,
            "head_trained": False,
            "masked": 0.4,
            "h": 8,
            "v": 9,
            "model": "other",
        }
        for name, other in {**settings, "suite": "linear-topk", "impl": "plain"}.items():
            assert not fits([*same[:2], changed(same[2], **{name: other})]), name
        assert not fits([linear("caop_fast", n, status="oom" if n == 64 else "ok") for n in (64, 128, 256)])

    def test_a_value_that_is_not_positive_has_no_exponent(self) -> None:
        time, memory = fits([linear("plain", n, peak_bytes=n - 64) for n in (64, 128, 256)])
        assert (memory.exponent, memory.slope, time.slope) == (None, pytest.approx(1), 0)


class TestPlots:
    def test_planned_where_there_is_something_to_see(self) -> None:
        several = [linear(i, n) for i in ("caop_fast", "plain", "official", "trl-chunked") for n in (64, 128)]
        assert [p.name for p in plots.plan(results(*several))] == ["x-linear-bfloat16-growth.png", "x-linear-error.png"]
        assert not plots.plan(results(linear("caop_fast"), linear("plain", status="oom", n=64)))
        title = plots.plan(results(*several))[0].title
        assert title.split("\n") == [
            "linear: time and memory against N, NVIDIA H100",
            "Qwen3-8B, V 151936, H 4096, bfloat16, beta 0, head trained",
        ]

    def test_colours(self) -> None:
        assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
        assert plots.colour("unheard-of") == plots.colour("unheard-of")
        assert [i for i in plots.COLOURS if plots.marker(i) == plots.marker("caop_fast")] == ["caop_fast"]

    def test_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="plots need matplotlib")
        names = ("caop_fast", "caop_fast-min", "plain", "official", "trl-chunked", "$new$")
        records = [linear(i, n, time_ms=n + k, peak_bytes=None) for k, i in enumerate(names) for n in (64, 128)]
        records += [linear("plain", 256, status="oom", reason="out of memory")]
        made = plots.plan(results(*records))
        assert len(made) == 2
        for picture in made:
            plots.draw(picture, tmp_path / picture.name)
            assert (tmp_path / picture.name).read_bytes().startswith(b"\x89PNG")
