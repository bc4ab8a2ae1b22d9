"""Distillation against a sparse teacher, on logits and from hidden states."""

from __future__ import annotations

from benchmarks import suite

SUITES = ("topk", "linear-topk")


def test_topk(benchmark, capsys, device, case, peer):
    suite.run(benchmark, capsys, device, case, peer)
