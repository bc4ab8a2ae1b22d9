"""Every planted error still finds the code that it replaces, and its test file. ``make plant-errors`` runs them."""

from __future__ import annotations

import pytest

from tools.plant_errors import PLANTS, ROOT, Plant, places


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.promise)
def test_the_code_to_replace_is_there_once(plant):
    assert len(places(plant)) == 1
    assert (ROOT / plant.test.split("::")[0]).exists()


def test_patterns_survive_another_format(tmp_path):
    (tmp_path / "code.py").write_text("total = first(\n    # why\n    second,\n    third)\n")
    plant = Plant("", ".", "first(second, third)", "0", "")
    (place,) = places(plant, tmp_path)
    assert (tmp_path / "code.py").read_text()[place.start : place.stop].endswith("third)")
    assert places(plant._replace(old="first(second, fourth)"), tmp_path) == []
