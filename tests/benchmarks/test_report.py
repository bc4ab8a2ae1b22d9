"""The report of the benchmarks: what it says follows from the records, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import FORMAT, Record, Results, load
from benchmarks.report import page, plots, sections
from benchmarks.report.__main__ import main
from benchmarks.report.groups import groups, largest_common, target_case
from benchmarks.report.plots import Picture
from benchmarks.report.tables import error, escape, number, percent, size, table
from helpers.report_records import cells, changed, good, linear, logits, rendered, results, save, tables


def run(folder: Path, *arguments: str) -> int:
    return main(["--results", str(folder), "--out", str(folder.parent / "RESULTS.md"), *arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results; plots are empty files."""
    monkeypatch.setattr(plots, "unavailable", lambda: None)

    def draw(picture: Picture, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monkeypatch.setattr(plots, "draw", draw)
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


class TestTables:
    def test_numbers(self) -> None:
        values = [None, 0, 9.999, 12.345, 1234.5, 151936, 0.01234, -2.5, 1.2e-7, 3e9, float("inf")]
        shown = ["–", "0", "10.0", "12.3", "1234", "151936", "0.0123", "-2.50", "1.20e-07", "3.00e+09", "inf"]
        assert [number(v, 3 if v != 151936 else 6) for v in values] == shown
        assert [size(v) for v in (None, 0, 123_456_789, 999_900_000, 12_345_678_901)] == [
            *("–", "0 MB", "123 MB", "1.00 GB", "12.3 GB")
        ]
        assert [percent(v) for v in (None, 0.034, 0.0996, 1.1)] == ["–", "3.4 %", "10 %", "110 %"]
        assert [error(v) for v in (None, 0.0, 3.14e-7)] == ["–", "0", "3.1e-07"]

    def test_no_text_breaks_a_row(self) -> None:
        rude = "a|b\\|c\n<img> *x* `y` [z](w)"
        (row,) = [cells(r) for r in table(["x", "y"], [[escape(rude), "1"]])[2:3]]
        assert len(row) == 2
        assert re.sub(r"\\(.)", r"\1", row[0]) == " ".join(rude.split())

    def test_rude_names_everywhere(self) -> None:
        rude: dict[str, Any] = {"model": "M|\\", "gives": "l|oss", "case": "c|ase"}
        records = [linear(f"impl|{i}", n, **{**rude, "case": f"c|{n}"}) for i in range(3) for n in (1, 2, 4)]
        records += [linear("caop_fast", n, **{**rude, "case": f"c|{n}"}) for n in (1, 2, 4)]
        records += [linear("plain", 1, status="error", reason="bad | <b> \n| x |", **rude)]
        step = {"tokens_per_s": 5.0, "split_ms": {"a|b": 1.0}}
        records += [Record("step", "s|", "x|y", time_ms=1.0, extra=step), Record("odd|suite", "c", "caop_fast")]
        text = rendered(*records, device="De|vice", command="a | b")
        found = tables(text)
        assert len(found) > 8
        for block in found:
            assert {len(row) for row in block} == {len(block[0])}, block[0]
        assert not re.search(r"(?<!\\)<b>", text)


class TestSections:
    def test_a_ratio_is_to_caop_fast_of_the_same_case(self) -> None:
        records = [linear(i, n, time_ms=n * f) for n in (64, 128) for i, f in (("caop_fast", 1.0), ("plain", 2.5))]
        found = tables("\n".join(sections.every_case(groups(records))))
        times = next(block for block in found if block[0][0] == "N")
        assert times == [["N", "caop_fast", "plain"], ["64", "64.0", "160 (2.50x)"], ["128", "128", "320 (2.50x)"]]

    def test_detail(self) -> None:
        ours = linear("caop_fast", tflops=300.0)
        other = linear("plain", time_ms=20.0, time_low_ms=19.0, time_high_ms=21.0, peak_bytes=4 * 10**9)
        text = "\n".join(sections.detail(groups([other, ours])[0]))
        assert text.startswith(
            "In detail: Qwen3-8B, N 8192, V 151936, H 4096, bfloat16, beta 0, head trained; floor: gemms"
        )
        head, first, second = tables(text + "\n")[0]
        assert dict(zip(head[2:6], first[2:6], strict=True)) == {
            "time, ms": "10.0 (9.90–10.4; 50)",
            "relative": "–",
            "floor/time": "80 %",
            "TFLOP/s": "300",
        }
        assert second == [
            "plain",
            "loss",
            "20.0 (19.0–21.0; 50)",
            "2.00x",
            "40 %",
            "–",
            "4.00 GB",
            "4.00x",
            "1.0e-04",
            "4.0e-03",
        ]

    def test_what_was_not_measured_is_a_word_with_a_reason(self) -> None:
        statuses = ("skipped", "oom", "wrong", "error", "crashed")
        records = [linear("caop_fast", n) for n in (64, 128, 256)] + [linear("plain", n) for n in (64, 128)]
        records += [linear(f"peer-{s}", n, status=s, reason=f"{s} of {n} bytes") for s in statuses for n in (64, 128)]
        text = rendered(*records, linear("peer-error", 256, status="error", reason=None))
        times = next(block for block in tables(text) if block[0][0] == "N")
        assert times[0] == ["N", "caop_fast", "plain", "peer-crashed", "peer-error", "peer-oom", "peer-wrong"]
        assert times[1][3:] == ["crashed", "error", "oom", "wrong"]
        assert times[3][2:] == ["–", "–", "error", "–", "–"]
        lines = re.findall(r"^- (?:skipped|oom|wrong|error|crashed): .*", text, re.MULTILINE)
        assert lines == [
            "- skipped: skipped of 128 bytes (and 1 like it): peer-skipped (2)",
            "- oom: oom of 128 bytes (and 1 like it): peer-oom (2)",
            "- wrong: wrong of 128 bytes (and 1 like it): peer-wrong (2)",
            "- error: no reason recorded: peer-error (1) on Qwen3-8B N=256 V=151936 H=4096 bfloat16",
            "- error: error of 128 bytes (and 1 like it): peer-error (2)",
            "- crashed: crashed of 128 bytes (and 1 like it): peer-crashed (2)",
        ]

    def test_nothing_known_is_no_error(self) -> None:
        bare = [Record(s, "c", i) for s in ("linear", "logits", "tokens", "step") for i in ("caop_fast", "plain")]
        crash = Record("linear", "d", "caop_fast", status="crashed", reason="the process ended while it ran")
        text = page.markdown(
            [Results(Path("x.json"), {"format": FORMAT}, [*bare, crash])], Path("r"), Path("R.md"), pictures=True
        )
        assert "None" not in text
        assert "the process ended while it ran: caop_fast (1) on d" in text
        assert "correctness: not checked" in text

    def test_a_single_record_each(self) -> None:
        for record in (linear("caop_fast"), linear("plain"), logits("caop_fast"), linear("x", status="oom")):
            assert tables(rendered(record))

    @pytest.mark.parametrize(("whole", "dead"), [("caop_fast", "plain"), ("plain", "caop_fast")])
    def test_a_crash_takes_its_shape_from_the_others(self, whole, dead) -> None:
        records = [linear(whole), Record("linear", linear("x").case, dead, status="crashed", reason="gone")]
        (group,) = groups(records)
        assert (group.shape.model, group.shape.n, list(group.records)) == ("Qwen3-8B", 8192, ["caop_fast", "plain"])
        assert groups(reversed(records)) == [group]

    def test_overview(self) -> None:
        records = [linear("caop_fast", n) for n in (1, 2, 3, 4)] + [linear("plain", 4, status="oom")]
        sizes = ((1, 20.0, 3e-3), (2, 30.0, 9e-3), (3, 50.0, 5e-3))
        records += [linear("plain", n, time_ms=t, peak_bytes=n * 10**9, grad_error=e) for n, t, e in sizes]
        head, ours, plain = tables("\n".join(sections.overview(groups(records))) + "\n")[0]
        assert head[4:6] == ["relative time", "relative memory"]
        assert ours == ["caop_fast", "bfloat16", "loss", "4 ok", "–", "–", "1.0e-04", "4.0e-03"]
        assert plain[3:] == ["3 ok, 1 oom", "3.00x (2.00–5.00)", "2.00x (1.00–3.00)", "1.0e-04", "9.0e-03"]

    def test_models_say_their_shapes_once(self) -> None:
        shapes = {"A": (1000, 8), "B": (2000, 16)}
        records = [
            linear("caop_fast", n, model=m, v=v, h=h, beta=b, case=f"{m} {n} {b}")
            for m, (v, h) in shapes.items()
            for n in (1, 2)
            for b in (0.0, 1.0)
        ]
        lines = sections.every_case(groups(records))
        assert lines[0] == "Every case: A (V 1000 x H 8), B (V 2000 x H 16)."
        assert tables("\n".join(lines) + "\n")[0][0] == ["model", "N", "beta", "caop_fast"]
        records.append(changed(records[0], v=3000, case="another"))
        assert tables("\n".join(sections.every_case(groups(records))) + "\n")[0][0][:4] == ["model", "N", "V", "H"]

    def test_long_tables_are_split_and_lose_nothing(self) -> None:
        shapes = [(b, t, n) for b in (0.0, 0.5, 1.0) for t in (True, False) for n in range(1, 16)]
        records = [linear("plain", n, beta=b, head_trained=t, case=f"{b} {t} {n}") for b, t, n in shapes]
        parts = sections.parts(groups(records))
        assert max(map(len, parts)) <= sections.ROWS
        assert sum(map(len, parts)) == 90
        assert all(len({g.shape.beta for g in part}) == 1 for part in parts)

    def test_step(self) -> None:
        split = {"optimiser": 10.0, "loss": 20.0, "rollout": None, "other": 30.0, "teacher": 40.0}
        extra = {"split_ms": split, "layers": 4, "layers_published": 36, "tokens": 8192, "prompts": 8, "rollouts": 2}
        speeds = {"tokens_per_s": 8000.0, "tokens_per_s_without_rollout": 9000.0}
        ours = Record("step", "s", "caop_fast", time_ms=100.0, peak_bytes=10**9, extra={**extra, **speeds})
        other = dataclasses.replace(ours, impl="official", grad_error=1e-3, extra={**extra, "tokens_per_s": 4000.0})
        oom = Record("step", "s", "plain", status="oom", reason="out of memory")
        text = rendered(other, oom, ours)
        assert "s: 4 of 36 published layers, 8 prompts with 2 rollouts each, 8192 tokens per step." in text
        parts = ["rollout, ms", "teacher, ms", "loss, ms", "optimiser, ms", "other, ms"]
        spent = ["–", "40.0 (40 %)", "20.0 (20 %)", "10.0 (10 %)", "30.0 (30 %)", "1.00 GB", "–"]
        speed = ["tokens/s", "relative", "tokens/s without rollout", "step, ms"]
        assert tables(text)[-1] == [
            ["implementation", *speed, *parts, "memory", "loss error", "gradient error"],
            ["caop_fast", "8000", "–", "9000", "100", *spent, "–"],
            ["official", "4000", "0.500x", "–", "100", *spent, "1.0e-03"],
            ["plain", "oom", *["–"] * 11],
        ]

    def test_the_case_of_the_targets_and_the_largest_common_one(self) -> None:
        records = [linear(i, n) for i in ("caop_fast", "plain", "official") for n in (256, 4096)]
        records += [linear(i, 8192) for i in ("caop_fast", "plain")] + [linear("caop_fast", 32768)]
        found = groups(records)
        target, common = target_case(found), largest_common(found)
        assert target is not None
        assert common is not None
        assert (target.shape.n, common.shape.n) == (8192, 4096)
        assert sections.details(found) == [target, common]
        assert largest_common(groups([linear("plain")])) is None


class TestHeader:
    def test_correctness_ceilings_and_commit(self) -> None:
        failures = [f"check {i}: <wrong>" for i in range(30)]
        checked = {"passed": 7, "failed": 30, "skipped": 2, "failures": failures, "skips": {"the time ran out": 2}}
        text = rendered(linear("caop_fast"), correctness=checked, dirty=True, finished=False)
        assert "7 passed, 30 failed, 2 skipped; **the times below are of incorrect code**" in text
        assert text.count("- failed: check ") == page.FAILURES
        assert "and 10 more in the file" in text
        assert "commit: c0ffee with uncommitted changes" in text
        assert "measured throughput: copy 3000 GB/s, GEMM bfloat16 700 TFLOP/s" in text
        assert "the time ran out before all cases were measured" in text
        (versions,) = re.findall(r"- versions: .*", text)
        assert "trl" not in versions
        clean = rendered(linear("caop_fast"), correctness={"passed": 7, "failed": 0, "skipped": 0, "failures": []})
        assert "uncommitted" not in clean
        assert "is wrong**" not in clean

    def test_what_the_order_did(self) -> None:
        """Ours once more behind the others, and the floor with it, over what they took at first."""
        again = [linear("caop_fast", extra={"again_ms": 10.5, "floor_again_ms": 8.2})]
        again += [linear("caop_fast", 256, extra={"again_ms": 9.0, "floor_again_ms": 8.0}), linear("plain")]
        text = "\n".join(page.header(results(*again)))
        assert (
            "measured again after all other implementations, relative to the first time: "
            "caop_fast 0.975x (0.900–1.05), the floor 1.01x (1.00–1.02)" in text
        )
        assert "measured again" not in "\n".join(page.header(results(linear("caop_fast"))))


class TestCommand:
    def test_two_files_newest_first_and_the_order_of_records_does_not_matter(self, folder: Path) -> None:
        records = [*good(), *(linear(i, n) for i in ("caop_fast", "plain", "new") for n in (256, 1024))]
        cpu = [changed(r, model="small") for r in records if r.suite == "linear"]
        save(folder, "a-gpu.json", *records, device="GPU")
        save(folder, "b-cpu.json", *cpu, device="CPU", kind="cpu", date="2025-11-26T00:00:00+00:00")
        assert run(folder) == 0
        out = folder.parent / "RESULTS.md"
        text = out.read_bytes()
        assert re.findall(rb"^## .*", text, re.MULTILINE) == [b"## CPU, 2025-11-26", b"## GPU, 2025-11-25"]
        random.Random(0).shuffle(records)
        save(folder, "a-gpu.json", *records, device="GPU")
        assert run(folder) == 0
        assert out.read_bytes() == text
        for link in re.findall(rb"\]\((.*?\.png)\)", text):
            assert (folder.parent / link.decode()).is_file()
        assert b"results/plots/a-gpu-linear-bfloat16-growth.png" in text

    def test_check(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save(folder, "a.json", *good(), *(linear("caop_fast", n) for n in (64, 128)))
        out = folder.parent / "RESULTS.md"
        assert run(folder, "--check") == 1, "there is none"
        assert run(folder) == 0
        assert run(folder, "--check") == 0
        text = out.read_text(encoding="utf-8")
        assert "1.300x" in text
        capsys.readouterr()
        for edited in (text.replace("1.300x", "1.200x"), text + "\n", text.replace("**", "__"), text[:-20], ""):
            out.write_text(edited, encoding="utf-8")
            assert run(folder, "--check") == 1
        assert out.read_text(encoding="utf-8") == "", "a check writes nothing"
        out.write_text(text.replace("1.300x", "1.200x"), encoding="utf-8")
        run(folder, "--check")
        said = capsys.readouterr().err
        assert "1.200x" in said
        assert "1.300x" in said

    def test_check_after_a_new_record(self, folder: Path) -> None:
        save(folder, "a.json", *good())
        assert run(folder) == 0
        found = load(folder / "a.json")
        found.add(dataclasses.replace(found.records[0], time_ms=10.39))
        assert run(folder, "--check") == 1

    def test_without_matplotlib(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save(folder, "a.json", *good(), *(linear("caop_fast", n) for n in (64, 128)))
        monkeypatch.setattr(plots, "unavailable", lambda: "matplotlib is not installed")
        assert run(folder) == 0
        text = (folder.parent / "RESULTS.md").read_text(encoding="utf-8")
        assert "Without plots: matplotlib was not installed" in text
        assert "![" not in text
        assert "no plots: matplotlib" in capsys.readouterr().out
        monkeypatch.setattr(plots, "unavailable", lambda: None)
        assert run(folder, "--check") == 0, "nor does a check need the same packages"
        assert run(folder) == 0
        assert "Without plots" not in (folder.parent / "RESULTS.md").read_text(encoding="utf-8")
        next((folder / "plots").glob("*.png")).unlink()
        assert run(folder, "--check") == 1, "a plot is missing"

    @pytest.mark.parametrize("arguments", [(), ("--check",)])
    def test_refused(self, folder: Path, capsys: pytest.CaptureFixture[str], arguments) -> None:
        save(folder, "a.json", linear("caop_fast"))
        save(folder, "b.json", linear("caop_fast"), interpreted=True)
        assert run(folder, *arguments) == 2
        said = capsys.readouterr().err
        assert "b.json was measured in Triton's interpreter" in said
        assert "a.json" not in said
        assert not (folder.parent / "RESULTS.md").exists()
        (folder / "b.json").write_text(json.dumps({"header": {"format": FORMAT + 1}, "records": []}), encoding="utf-8")
        assert run(folder, *arguments) == 2
        assert f"format {FORMAT + 1}" in capsys.readouterr().err

    def test_no_results(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(folder) == 2
        assert "no results file" in capsys.readouterr().err
        assert run(folder, "--check") == 0
        (folder.parent / "RESULTS.md").write_text("12x faster\n", encoding="utf-8")
        assert run(folder, "--check") == 2
