"""The confidence losses, on logits and from hidden states."""

from __future__ import annotations

from benchmarks import suite

SUITES = ("confidence", "linear-confidence")


def test_confidence(benchmark, capsys, device, case, peer):
    suite.run(benchmark, capsys, device, case, peer)
