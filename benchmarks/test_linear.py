"""Distillation from hidden states and output heads."""

from __future__ import annotations

from benchmarks import suite

SUITES = ("linear",)


def test_linear(benchmark, capsys, device, case, peer):
    suite.run(benchmark, capsys, device, case, peer)
