"""What is measured and how: selections of cases, floors, times, peaks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import cases, floors, measure

CPU = torch.device("cpu")


@pytest.mark.parametrize("selection", cases.SELECTIONS)
def test_selections(selection: str) -> None:
    found = cases.SELECTIONS[selection]()
    assert len({(c.suite, c.name) for c in found}) == len(found), "names are unique within a suite"
    assert {c.suite for c in found} == set(cases.SUITES)


def test_the_gpu_selection_covers_what_it_should() -> None:
    found = cases.gpu()
    first = found[0]
    assert (first.suite, first.model, first.n, first.dtype) == ("linear", "Qwen3-8B", 8192, "bfloat16")
    assert first.head_trained
    for suite in ("linear", "logits"):
        shapes = {c.shape for c in found if c.suite == suite and c.model in cases.HEADS}
        trained = 2 if suite == "linear" else 1
        assert len(shapes) == len(cases.HEADS) * len(cases.SIZES) * 2 * len(cases.BETAS) * 2 * trained


def test_floors() -> None:
    found = floors.Floors(CPU, 0.01)
    case = cases.small("linear", 64, 128, 16)
    assert case.products == 4
    assert found.of(case).operations == 4 * 2 * 64 * 128 * 16
    assert found.of(dataclasses.replace(case, head_trained=False)).operations == 3 * 2 * 64 * 128 * 16
    assert found.of(cases.small("linear-tokens", 64, 128, 16)).operations == 3 * 2 * 64 * 128 * 16
    moved = found.of(cases.small("logits", 64, 128, 16, dtype="bfloat16", masked=0.5))
    assert moved.bytes == (2 * 32 + 64) * 128 * 2
    assert moved.ms == pytest.approx(moved.bytes / found.copy_gbps / 1e6)


def test_the_products_of_a_floor_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the whole [N, V] matrix would be too large: the same products."""
    monkeypatch.setitem(floors.PRODUCT_BYTES, "cpu", 4 * 128 * 10)
    assert floors.Floors(CPU, 0.01).of(cases.small("linear", 64, 128, 16)).ms > 0


def test_peak_and_allocations() -> None:
    def call() -> tuple[torch.Tensor, ...]:
        a = torch.empty(1000, dtype=torch.float32)
        b = torch.empty(500, dtype=torch.float32)
        del a
        return torch.empty(2000, dtype=torch.uint8), b

    found = measure.allocations(call)
    assert (found.count, found.total, found.peak, found.largest) == (3, 8000, 6000, 4000)
    assert measure.peak(call, CPU) == 6000


def test_steps_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    found = measure.timing([lambda: seen.append("a"), lambda: seen.append("b")], CPU, seconds=9.0, rounds=3, warmup=2)
    assert len(found.rounds) == 3
    assert seen == ["a", "b"] * 3
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def slow() -> None:
        seen.append("slow")
        clock[0] += 1.0

    found = measure.timing([slow], CPU, seconds=0.5, warmup=2)
    assert found.rounds == (1000.0,) * measure.MIN_ROUNDS
    assert seen.count("slow") == 1 + measure.MIN_ROUNDS, "a slow step has no second warm-up"
    assert measure.Timing((5.0, 1.0, 3.0)).median == 3.0
    assert measure.Timing((5.0, 1.0, 3.0)).quantile(0.2) == 1.0
