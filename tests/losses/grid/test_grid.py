"""The grid of options against float64: five statistics, the loss, and the gradient of a mix of four outputs."""

from __future__ import annotations

import pytest

from helpers.grid_cases import AXES, DTYPES, VOCABS, complaints, grid, make
from helpers.oracle import pairwise


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_grid_matches_float64(place, dtype, vocab, request):
    cases = grid(request.config.getoption("--full-grid"))[dtype, vocab]
    assert cases
    failures = []
    for case in cases:
        wrong = complaints(*make(case, place.device), place.backend)
        failures += [f"{case}: {what}" for what in wrong]
    assert not failures, f"{len(failures)} failures in {len(cases)} cases:\n" + "\n".join(failures[:20])


def test_the_cover_holds_every_pair_of_options():
    cases = [case for group in grid(False).values() for case in group]
    names = list(AXES)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            seen = {(case[first], case[second]) for case in cases}
            assert seen == {(a, b) for a in AXES[first] for b in AXES[second]}, (first, second)
    assert len(cases) == len(pairwise(**AXES)) < 40
    full = [case for group in grid(True).values() for case in group]
    assert len(full) == 1620
