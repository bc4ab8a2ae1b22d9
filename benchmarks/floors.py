"""Lower bounds of the time of a case on this device: a large copy or the matrix products alone, in the same run."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from benchmarks.cases import Case
from benchmarks.measure import timing

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
PRODUCT_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}  # at most, of the [N, V] matrix
SQUARE = {"cuda": 8192, "cpu": 1024}  # side of large matrix products
ROUNDS = 20


@dataclass(frozen=True)
class Floor:
    """``ms`` by ``kind`` ("copy" or "gemms"), and the bytes or operations in that time."""

    ms: float
    kind: str
    bytes: int = 0
    operations: int = 0


@dataclass
class Floors:
    """Measured once for each shape of a run."""

    device: torch.device
    seconds: float = 1.0
    known_copy_gbps: float | None = None  # from an earlier process of this run
    _products: dict[tuple[object, ...], float] = field(default_factory=dict)

    @functools.cached_property
    def copy_gbps(self) -> float:
        """Bandwidth of a large copy, bytes read plus bytes written, in 1e9 bytes/s."""
        return self._copy() if self.known_copy_gbps is None else self.known_copy_gbps

    def _copy(self) -> float:
        size = COPY_BYTES[self.device.type]
        source = torch.randn(size // 4, device=self.device)
        into = torch.empty_like(source)
        ms = timing([lambda: into.copy_(source)], self.device, seconds=self.seconds, rounds=ROUNDS).median
        return 2 * size / ms / 1e6

    def gemm_tflops(self, dtype: str) -> float:
        """Throughput of a large square product, in 1e12 operations/s."""
        side = SQUARE[self.device.type]
        a, b = (torch.randn(side, side, device=self.device, dtype=getattr(torch, dtype)) for _ in "ab")
        ms = timing([lambda: a @ b], self.device, seconds=self.seconds, rounds=ROUNDS).median
        return 2 * side**3 / ms / 1e9

    def of(self, case: Case) -> Floor:
        """The floor of a forward and backward of ``case``."""
        n = _working(case)
        return self._floor(case, n, self._gemms(case, n) if case.linear else self.copy_gbps)

    def again(self, case: Case) -> Floor:
        """The same as ``of``, measured again."""
        n = _working(case)
        return self._floor(case, n, self._measure(case, n) if case.linear else self._copy())

    @staticmethod
    def _floor(case: Case, n: int, measured: float) -> Floor:
        """From the ms of the products, or the GB/s of a copy."""
        if case.linear:
            return Floor(measured, "gemms", operations=case.products * 2 * n * case.v * case.h)
        moved = logit_bytes(case, n)
        return Floor(moved / measured / 1e6, "copy", bytes=moved)

    def _gemms(self, case: Case, n: int) -> float:
        key = (n, case.v, case.h, case.dtype, case.products, case.head_trained)
        if key not in self._products:
            self._products[key] = self._measure(case, n)
        return self._products[key]

    def _measure(self, case: Case, n: int) -> float:
        """The products of projections, grad_hidden and grad_weight, in chunks of at most ``PRODUCT_BYTES``."""
        dtype = getattr(torch, case.dtype)
        rows = min(n, max(1, PRODUCT_BYTES[self.device.type] // (case.v * dtype.itemsize)))
        hidden = torch.randn(n, case.h, device=self.device, dtype=dtype)
        weight = torch.randn(case.v, case.h, device=self.device, dtype=dtype)
        wide = torch.empty(rows, case.v, device=self.device, dtype=dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        projections = 2 if case.suite == "linear" else 1

        def products() -> None:
            for start in range(0, n, rows):
                h = hidden[start : start + rows]
                z = wide[: h.shape[0]]
                for _ in range(projections):
                    torch.mm(h, weight.t(), out=z)
                torch.mm(z, weight, out=grad_hidden[start : start + rows])
                if case.head_trained:
                    if rows >= n:
                        torch.mm(z.t(), h, out=grad_weight)
                    else:
                        grad_weight.addmm_(z.t(), h)

        return timing([products], self.device, seconds=self.seconds, rounds=ROUNDS).median


def _working(case: Case) -> int:
    """Number of tokens that are not masked."""
    return max(1, round(case.n * (1 - case.masked)))


def logit_bytes(case: Case, n: int) -> int:
    """Bytes of reading ``n`` rows of the inputs once and writing the gradient of every row once."""
    dense = 2 if case.suite == "logits" else 1
    return (dense * n + case.n) * case.v * getattr(torch, case.dtype).itemsize
