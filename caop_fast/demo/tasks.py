"""The demo's tasks by name."""

from __future__ import annotations

from caop_fast.demo.pronounce import Pronounce
from caop_fast.demo.sums import Sums
from caop_fast.demo.task import Task

TASK_NAMES = (Pronounce.name, Sums.name)


def load_task(name: str, *, seed: int = 0) -> Task:
    """The task called `name`: ``pronounce`` (the same rows for every seed) or ``sums`` (rows drawn from `seed`).

    Raises:
        ValueError: no task has that name.
    """
    if name == Pronounce.name:
        return Pronounce()
    if name == Sums.name:
        return Sums(seed=seed)
    raise ValueError(f"name must be one of {', '.join(TASK_NAMES)}, got {name!r}")
