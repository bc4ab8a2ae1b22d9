"""The report of the benchmarks: what it says follows from the records, and nothing else does."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.records import FORMAT, Record, Results, Shape, load

SHAPE = Shape("Qwen3-8B", "bfloat16", 8192, 151936, 4096, 0.0, True)
CEILINGS = {"copy_gbps": 3000.0, "gemm_tflops": {"bfloat16": 700.0, "float32": 50.0}}
SLOW = {"copy_gbps": 10.0, "gemm_tflops": {"bfloat16": 0.02, "float32": 0.1}}


def linear(impl: str, **fields: Any) -> Record:
    """A record of the linear loss in the reference case of a GPU; ``fields`` of its shape or its own."""
    shape = {f.name: fields.pop(f.name) for f in dataclasses.fields(Shape) if f.name in fields}
    made = Record("linear", "", impl, shape=dataclasses.replace(SHAPE, **shape), floor="gemms")
    if fields.get("status", "ok") == "ok":
        made = dataclasses.replace(
            made, time_ms=10.0, time_low_ms=9.9, time_high_ms=10.4, rounds=50, peak_bytes=10**9, floor_ms=9.0,
            loss_error=1e-4, grad_error=4e-3, gives="loss",
        )  # fmt: skip
    made = dataclasses.replace(made, **fields)
    return made if made.case else dataclasses.replace(made, case=f"N={made.shape.n} {made.shape.dtype}")


def logits(impl: str, **fields: Any) -> Record:
    return linear(impl, **{"suite": "logits", "floor": "copy", "h": None, "head_trained": None, **fields})


def results(*records: Record, name: str = "a", kind: str = "cuda", **head: Any) -> Results:
    known = {"format": FORMAT, "date": "2026-01-02T03:04:05", "device": "H100", "ceilings": CEILINGS}
    return Results(Path(f"{name}.json"), {**known, "device_type": kind, **head}, list(records))


def good() -> list[Record]:
    """All four targets met, barely."""
    return [
        linear("caop_fast", time_ms=9.6, floor_ms=8.0),
        linear("caop_fast-min", time_ms=1.0, peak_bytes=1),
        linear("official", time_ms=30.0, peak_bytes=8 * 10**9),
        linear("plain", time_ms=14.4, grad_error=8e-3),
        linear("trl-chunked", time_ms=11.0, grad_error=8.1e-3),
        logits("caop_fast", traffic_gbps=2400.0),
    ]


def tables(text: str) -> list[list[dict[str, str]]]:
    """Rows of every table by column, as GitHub splits them: at each | without a backslash before it."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        head, _, *rows = [[c.strip() for c in re.findall(r"((?:\\.|[^|\\])*)\|", x[1:])] for x in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def page(*records: Record, **head: Any) -> str:
    return report.page(results(*records, **head))


def test_numbers() -> None:
    shown = {9.999: "10.0", 12.345: "12.3", 1234.5: "1230", 151936: "152000", -2.5: "-2.50", 0.0123: "0.0123"}
    assert {v: report.number(v) for v in shown} == shown
    assert [report.number(v) for v in (None, 0, 0.0012, 3e9)] == ["–", "0", "1.20e-03", "3.00e+09"]


def test_the_answer() -> None:
    records = [*good(), linear("liger-chunked-jsd", time_ms=4.8, peak_bytes=5 * 10**8)]
    records.append(linear("liger-fused-linear-jsd", status="oom", reason="80 GB are not enough"))
    rows = {row["what you use today"]: list(row.values())[1:] for row in report.answer(results(*records))}
    assert rows["released CaOPD trainer"] == ["H100, 2026-01-02", "3.12x", "0.125x", "4.00e-03 / 4.00e-03"]
    assert rows["Liger, chunked"][1:3] == ["0.500x", "2.00x"]
    assert rows["Liger, fused"][1] == "not measured: oom, 80 GB are not enough"
    assert rows["PyTorch with torch.compile"][1:] == ["not measured: was not run", "–", "–"]
    assert "caop_fast-min" not in rows


def test_the_summary_names_winners_pages_and_what_is_not_measured() -> None:
    small = [linear(i, time_ms=t, n=n, dtype="float32") for n in (1, 2) for i, t in (("caop_fast", 2.0), ("plain", n))]
    cpu = results(*small, kind="cpu", device="CPU", name="cpu")
    text = report.summary([cpu], "results")
    assert "| any of these | NVIDIA H100 | not measured | – | – |" in text
    assert "[all numbers](results/cpu.md)): N=2 float32. Faster than caop_fast: plain PyTorch in 1 of 2 cases." in text
    both = report.summary([results(*good()), cpu], "r")
    assert "NVIDIA H100" not in both
    assert both.index("| H100") < both.index("| CPU")
    older = results(linear("caop_fast", time_ms=1.0), linear("plain"), date="2025-01-01", name="older")
    newer = results(linear("caop_fast", n=1), date="2027-01-01", name="newer")
    assert "3.12x" in report.summary([newer, results(*good()), older], "r"), "the newest with the reference case"
    assert "not measured: the reference case is not in the records" in report.summary([newer], "r")


def test_the_case_of_a_cpu_is_the_largest_common_one() -> None:
    shapes = [("caop_fast", 64), ("plain", 64), ("caop_fast", 128), ("plain", 128), ("caop_fast", 256)]
    records = [linear(i, n=n, dtype="float32", v=10, h=10) for i, n in shapes]
    records += [linear(i, n=512, dtype="bfloat16", v=10, h=10) for i in ("caop_fast", "plain")]
    assert report.reference(results(*records, kind="cpu"))["caop_fast"].shape.n == 512
    assert report.reference(results(*records, kind="cpu", ceilings=SLOW))["caop_fast"].shape.n == 128


def test_targets_that_are_just_met() -> None:
    rows = report.targets(results(*good()))
    assert [row["met"] for row in rows] == ["yes"] * 4
    assert [row["measured"] for row in rows] == ["1.50x", "0.125x", "0.800x", "1.20x"]
    assert "plain" in rows[0]["target"], "the fastest of equal accuracy, which trl-chunked is not"


@pytest.mark.parametrize(
    ("index", "suite", "impl", "fields", "verdict"),
    [
        (0, "linear", "plain", {"time_ms": 14.3}, "**no**"),
        (0, "linear", "trl-chunked", {"grad_error": 8e-3}, "**no**"),
        (0, "linear", "caop_fast", {"grad_error": 1e-4}, "not measured: no peer is as accurate"),
        (1, "linear", "official", {"peak_bytes": 7.99e9}, "**no**"),
        (1, "linear", "official", {"status": "oom", "reason": "a|b"}, r"not measured: oom, a\|b"),
        (2, "logits", "caop_fast", {"traffic_gbps": 2399.0}, "**no**"),
        (2, "logits", "caop_fast", {"traffic_gbps": None}, "not measured: not recorded"),
        (2, "logits", "caop_fast", {"suite": "x"}, "not measured: the reference case is not in the records"),
        (3, "linear", "caop_fast", {"time_ms": 9.61}, "**no**"),
        (3, "linear", "caop_fast", {"floor_ms": None}, "not measured: not recorded"),
        (3, "linear", "caop_fast", {"floor_ms": 11.0}, "not measured: the products alone took longer"),
        (3, "linear", "caop_fast", {"status": "crashed"}, "not measured: crashed, no reason"),
    ],
)
def test_targets_that_are_missed(index, suite, impl, fields, verdict) -> None:
    records = [dataclasses.replace(r, **fields) if (r.suite, r.impl) == (suite, impl) else r for r in good()]
    assert report.targets(results(*records))[index]["met"] == verdict


def test_rows_of_a_suite() -> None:
    peer = linear("plain", time_ms=20.0, time_low_ms=19.0, time_high_ms=21.0, peak_bytes=4 * 10**9)
    bound = linear("x", time_ms=8.0, extra={"host_ms": 7.2})
    first, second, third = tables(text := page(peer, bound, linear("caop_fast", extra={"host_ms": 8.9})))[0]
    assert [row["time, ms"][:8] for row in (first, second, third)] == ["10.0 (9.", "20.0 (19", "8.00† (9"]
    assert "†: bound by the host, launching kernels or waiting" in text
    assert [second["relative"], second["relative memory"], second["memory, MB"]] == ["2.00x", "4.00x", "4000"]
    assert [second["floor, ms"], third["floor, ms"]] == ["45.0 % of 9.00", "112 % of 9.00 (no lower bound)"]
    assert [first["loss error"], first["gradient error"], first["returns"]] == ["1.00e-04", "4.00e-03", "loss"]


def test_floors_of_emulated_products_are_left_out() -> None:
    records = [linear("caop_fast"), linear("caop_fast", dtype="float32"), logits("caop_fast")]
    text = page(*records, kind="cpu", ceilings=SLOW)
    assert "not usable on this machine (0.0200 TFLOP/s beside 0.100 in float32)" in text
    assert [rows[0]["floor, ms"] for rows in tables(text)] == ["–", "90.0 % of 9.00", "90.0 % of 9.00"]


def test_steps_profile_drift_and_correctness() -> None:
    extra = {"split_ms": {"rollout": 40.0, "a|b": 60.0}, "tokens_per_s": 8000.0}
    again = linear("caop_fast", extra={"again_ms": 10.5, "floor_again_ms": 9.9})
    row = {"name": "k|<b>", "calls": 3, "ms": 1.5, "gbps": None, "tflops": 640.0}
    step = Record("step", "s", "caop_fast", time_ms=100.0, extra=extra)
    text = page(step, again, profile={"linear": {"ms": 2.5, "rows": [row]}}, correctness={"passed": 7, "failed": 1})
    _, steps, profile = tables(text)
    assert [steps[0][k] for k in ("tokens per s", "rollout, ms", r"a\|b, ms")] == ["8000", "40.0", "60.0"]
    assert "## Where the time goes: linear, 2.50 ms" in text
    assert profile == [{"name": r"k\|\<b\>", "calls": "3", "ms": "1.50", "GB/s": "–", "TFLOP/s": "640"}]
    assert "- caop_fast measured again at the end of its case: 1.05x (1.05–1.05)" in text
    assert "- its floor measured again at the end of its case: 1.10x" in text
    assert "- correctness: passed 7, failed 1" in text
    assert "- **the times are of incorrect code**" in text


def test_growth_and_what_was_not_measured() -> None:
    ours = [linear("caop_fast", n=n, time_ms=n**1.5, peak_bytes=7 * n) for n in (64, 1024, 256)]
    lost = [linear("x", n=n, status="error", reason="bad | <b>\n| x") for n in (1, 2)]
    lost += [Record("linear", "c", "y", status="crashed"), *(linear("plain", n=n) for n in (64, 128))]
    *_, growth, failed = tables(page(*ours, *lost))
    assert growth == [{"up to": "linear: N=1024 bfloat16", "of": "caop_fast", "time": "1.50", "memory": "1.00"}]
    text = " ".join(" ".join(row.values()) for row in failed)
    assert text == r"crashed – y 1 error bad \| \<b\> \| x x 2"


def test_no_text_breaks_a_page() -> None:
    rude = "a|b\\|c\n<img> *x* `y` [z](w) & $m$"
    assert re.sub(r"\\(.)", r"\1", report.escape(rude)) == " ".join(rude.split())
    fields = {"model": rude, "gives": rude, "dtype": rude}
    records = [linear(i, n=n, case=f"{n}{rude}", **fields) for i in (rude, "caop_fast") for n in (1, 2, 4)]
    head: dict[str, Any] = {rude: rude, "device": rude, "versions": {rude: rude}}
    for text in (page(*records, **head), report.summary([results(*records, kind="cpu", **head)], "r")):
        assert tables(text)
        assert not re.search(r"(?<!\\)<img>|^[^`]*(?<!\\)`y", text, re.MULTILINE)


def test_nothing_known_is_no_error() -> None:
    bare = [Record(s, "c", i) for s in ("linear", "logits", "step") for i in ("caop_fast", "plain")]
    found = Results(Path("x.json"), {"format": FORMAT}, [*bare, linear("caop_fast", time_ms=1.0, floor=None)])
    assert "1.00 (" in report.page(found)
    assert report.summary([found, Results(Path("y.json"), {}, [])], "r")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results file, and no report yet."""
    records = [*good(), *(linear(i, n=n) for i in ("caop_fast", "plain") for n in (64, 128))]
    Results(tmp_path / "results" / "a.json", results().header, records).save()
    return tmp_path / "results"


def test_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--results", str(folder)]
    assert report.main([*run, "--check"]) == 1, "there is none"
    assert [report.main(run), report.main([*run, "--check"])] == [0, 0]
    files = {path: path.read_bytes() for path in (folder.parent / "RESULTS.md", folder / "a.md")}
    for path, text in files.items():
        for edited in (text.replace(b"1.50x", b"1.60x"), text + b"\n", text.replace(b"\n", b"\r\n"), b"\xff"):
            path.write_bytes(edited)
            assert report.main([*run, "--check"]) == 1
            assert path.read_bytes() == edited, "a check writes nothing"
        path.write_bytes(text)
    assert "\n+| linear loss, speed: ours / plain | ≥ 1.5x | 1.50x | yes |" in capsys.readouterr().err
    found = load(folder / "a.json")
    random.Random(0).shuffle(found.records)
    found.save()
    assert report.main(run) == 0
    assert {path: path.read_bytes() for path in files} == files, "the order of the records does not matter"
    found.add(dataclasses.replace(found.records[0], time_ms=10.39))
    assert report.main([*run, "--check"]) == 1


def test_elsewhere(folder: Path) -> None:
    run = ["--results", str(folder), "--out", str(out := folder.parent / "elsewhere.md")]
    assert report.main(run) == 0
    assert "(results/a.md)" in out.read_text(encoding="utf-8")
    assert report.main([*run, "--check"]) == 0


@pytest.mark.parametrize(("head", "said"), [({"interpreted": True}, "b.json"), ({"format": 2}, "format 2")])
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], head: dict[str, Any], said: str) -> None:
    (folder / "b.json").write_text(json.dumps({"header": {"format": FORMAT, **head}, "records": []}))
    for where, words in ((folder, said), (folder.parent, "no results file")):
        with pytest.raises(SystemExit, match=r"^2$"):
            report.main(["--results", str(where), "--check"])
        assert words in capsys.readouterr().err
