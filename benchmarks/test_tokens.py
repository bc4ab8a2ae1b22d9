"""Statistics of the student alone, on logits and from hidden states."""

from __future__ import annotations

from benchmarks import suite

SUITES = ("tokens", "linear-tokens")


def test_tokens(benchmark, capsys, device, case, peer):
    suite.run(benchmark, capsys, device, case, peer)
