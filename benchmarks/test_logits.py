"""Distillation on logits, beside what it is usually written as."""

from __future__ import annotations

from benchmarks import suite

SUITES = ("logits",)


def test_logits(benchmark, capsys, device, case, peer):
    suite.run(benchmark, capsys, device, case, peer)
