"""What is measured and how: cases, memory they need, floors, times, peaks, the kernels of a call."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, measure, peers
from benchmarks.inputs import make
from benchmarks.records import quantiles

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", cases.STAGES)
def test_names_are_unique(device: str) -> None:
    found = [case for stage in ("targets", "rest") for case in cases.STAGES[device][stage]()]
    assert len({(c.suite, c.name) for c in {*found}}) == len({*found})
    assert {c.suite for c in found} == set(cases.SUITES)


def test_the_cases_of_a_gpu_begin_with_the_targets() -> None:
    first = cases.targets()[0]
    assert (first.suite, first.model, first.n, first.dtype) == ("linear", "Qwen3-8B", 8192, "bfloat16")
    assert first.head_trained
    for suite in ("linear", "logits"):
        shapes = {c.shape for c in cases.rest() if c.suite == suite}
        trained = 2 if suite == "linear" else 1
        assert len(shapes) == len(cases.HEADS) * len(cases.SIZES) * 2 * len(cases.BETAS) * 2 * trained


def test_a_case_that_does_not_fit_says_so_before_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs about 1000000.0 GB of" in str(peers.too_large(1e15, CPU))
    monkeypatch.setattr(peers, "too_large", lambda needed, device: "no" if needed > 80e9 else None)
    case = cases.targets()[0]
    able = {p.name for p in peers.of_case(case) if p.refusal(case, CPU) is None}
    assert {"caop_fast", "official", "plain"} <= able
    large = cases.case("linear", "Qwen3-8B", 32768)
    assert peers.named("official").refusal(large, CPU) == "no"
    assert peers.named("caop_fast").refusal(large, CPU) is None


@pytest.mark.parametrize("impl", ["official", "plain"])
@pytest.mark.parametrize("suite", ["linear", "logits"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_memory_a_case_needs_is_near_what_it_takes(impl: str, suite: str, beta: float) -> None:
    case = cases.small(suite, 64, 20000, 16, beta=beta)
    peer, inputs = peers.named(impl), make(case, CPU)
    loss = peer.build(case)
    taken = measure.peak(lambda: loss(inputs).backward(), CPU) + inputs.bytes()
    assert 0.95 < peer.needed_bytes(case) / taken < 1.7


def test_input_bytes() -> None:
    for suite in cases.SUITES:
        case = cases.small(suite, 50, 3000, 40)
        inputs = make(case, CPU)
        gradients = sum(leaf.nbytes for leaf in inputs.leaves().values())
        assert case.input_bytes == pytest.approx(inputs.bytes() + gradients, rel=0.15), suite


def test_floors() -> None:
    case = cases.small("linear", 64, 128, 16)
    for changed, products in (
        (case, 4),
        (dataclasses.replace(case, head_trained=False), 3),
        (dataclasses.replace(case, suite="linear-tokens"), 3),
    ):
        assert changed.products == products
        assert measure.floor(changed, CPU, 1.0, 0.01).operations == products * 2 * 64 * 128 * 16
    moved = measure.floor(cases.small("logits", 64, 128, 16, "bfloat16", masked=0.5), CPU, 2.0)
    assert moved.bytes == (2 * 32 + 64) * 128 * 2
    assert moved.ms == pytest.approx(moved.bytes / 2.0 / 1e6)
    assert measure.copy_gbps(CPU, 0.01) > 0
    assert measure.gemm_tflops(CPU, "float32", 0.01) > 0


def test_the_products_of_a_floor_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the whole [N, V] matrix would be too large: the same products."""
    monkeypatch.setitem(measure.PRODUCT_BYTES, "cpu", 4 * 128 * 10)
    assert measure.floor(cases.small("linear", 64, 128, 16), CPU, 1.0, 0.01).ms > 0


def test_peak_and_allocations() -> None:
    def call() -> tuple[torch.Tensor, ...]:
        a = torch.empty(1000, dtype=torch.float32)
        b = torch.empty(500, dtype=torch.float32)
        del a
        return torch.empty(2000, dtype=torch.uint8), b

    assert measure.allocations(call)[:4] == [4000, 2000, -4000, 2000]
    assert measure.peak(call, CPU) == 6000


def test_steps_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    found = measure.timing([lambda: seen.append("a"), lambda: seen.append("b")], CPU, seconds=9.0, rounds=3, warmup=2)
    assert len(found) == 3
    assert seen == ["a", "b"] * 3
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def slow() -> None:
        seen.append("slow")
        clock[0] += 1.0

    assert measure.timing([slow], CPU, seconds=0.5, warmup=2) == [1000.0] * measure.MIN_ROUNDS
    assert seen.count("slow") == 1 + measure.MIN_ROUNDS, "a slow step has no second warm-up"
    assert measure.host_ms([slow], CPU) == 1000.0
    assert quantiles((5.0, 1.0, 3.0)) == {"time_ms": 3.0, "time_low_ms": 1.0, "time_high_ms": 5.0, "rounds": 3}


def test_the_operations_of_products_are_counted() -> None:
    a, b, total = torch.randn(8, 16), torch.randn(16, 32), torch.zeros(8, 32)

    def call() -> None:
        torch.mm(a, b, out=total)
        total.addmm_(a, b)
        torch.add(total, 1)

    found = measure.profile(call, CPU, 1.0)
    rows = {row["name"]: row for row in found["rows"]}
    for name in ("aten::mm", "aten::addmm_"):
        assert rows[name]["calls"] == 1
        assert rows[name]["tflops"] * rows[name]["ms"] * 1e9 == pytest.approx(2 * 8 * 16 * 32)
    assert rows["aten::add"]["tflops"] is None
    assert found["ms"] == pytest.approx(sum(row["ms"] for row in found["rows"]))


def test_kernels_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch's profiler reports them: an operator on the host with its kernels, and each kernel by itself."""
    cuda, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def kernel(name: str, us: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=cuda, input_shapes=[], kernels=[], self_device_time_total=us)

    launched = [SimpleNamespace(name="memset", duration=1.0), SimpleNamespace(name="gemm", duration=2000.0)]
    product = SimpleNamespace(
        name="aten::mm", device_type=host, input_shapes=[[8, 16], [16, 32]], kernels=launched, self_cpu_time_total=9.0
    )
    events = [product, kernel("memset", 1.0), kernel("gemm", 2000.0), kernel("row_kernel", 500.0)]
    found = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(found))
    monkeypatch.setattr(measure, "synchronize", lambda device: None)
    monkeypatch.setattr(
        measure, "_bytes_of_kernels", lambda: contextlib.nullcontext({"row_kernel": 10**6, "memset": 10**9})
    )
    made = measure.profile(lambda: None, torch.device("cuda"), 100.0)
    rows = {row["name"]: row for row in made["rows"]}
    assert [*rows] == ["gemm", "row_kernel", "memset"]
    assert rows["gemm"]["tflops"] == pytest.approx(2 * 8 * 16 * 32 / 2.0 / 1e9)
    assert rows["memset"]["tflops"] is None
    assert rows["row_kernel"]["gbps"] == pytest.approx(2.0)
    assert rows["memset"]["gbps"] is None, "it cannot have moved so much"
    assert made["ms"] == pytest.approx(2.501)
    monkeypatch.setattr(found, "events", lambda: [product])
    with pytest.raises(RuntimeError, match="nothing on the device"):
        measure.profile(lambda: None, torch.device("cuda"), 100.0)


def test_bytes_of_kernels() -> None:
    """Of every tensor that a launch is given, by kernel; afterwards launches are as before."""
    jit = pytest.importorskip("triton.runtime.jit")

    class Kernel(jit.KernelInterface):
        def __init__(self, name: str) -> None:
            self.fn = SimpleNamespace(__name__=name)

        def __getitem__(self, grid: object) -> object:
            return lambda *arguments, **options: (arguments, options)

    before = Kernel.__getitem__
    x = torch.zeros(10)
    with measure._bytes_of_kernels() as moved:
        assert Kernel("a")[(1,)](x, 3, out=x)[0] == (x, 3)
        Kernel("a")[(1,)](x)
        Kernel("b")[(1,)](torch.zeros(4, dtype=torch.int8))
    assert moved == {"a": 120, "b": 4}
    assert Kernel.__getitem__ is before
