"""Keys that do not depend on the order of launches.

Triton (3.6 and 3.7 at least) merges the constants of a helper into the hash of the function that calls it, but before
it hashes the helper, which is what finds them. So they count only if another kernel had the helper hashed before, and a
kernel has one key or another depending on what a process launched first. Helpers must be hashed first, both where
kernels are compiled and where they are launched.
"""

from __future__ import annotations

from typing import Any

SETTLED = "TRITON_CACHE_SETTLED_KEYS"  # in the environment: every process that reads sitecustomize.py settles its keys


def settle() -> None:
    """Hash helpers before the functions that call them, from here on in this process."""
    from triton.runtime.jit import DependenciesFinder

    known = DependenciesFinder._update_hash
    if getattr(known, "settled", False):
        return

    def update_hash(finder: Any, function: Any) -> None:
        _ = function.cache_key  # a property that finds the constants
        known(finder, function)

    update_hash.settled = True  # type: ignore[attr-defined]
    DependenciesFinder._update_hash = update_hash
