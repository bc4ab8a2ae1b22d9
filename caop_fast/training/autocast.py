"""Under ``torch.autocast``: low-precision copies of the weights that are never older than the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fresh_weight_casts(*, cache: bool = True) -> Iterator[None]:
    """Run the block on casts of the current weights, whatever autocast regions are open around it.

    Autocast caches the low-precision copy of each parameter until its *outermost* region ends. Where one region spans
    several optimizer steps, every forward after the first would use the weights of the first. Here copies made before
    the block are dropped on entry, and those of the block on exit.

    Args:
        cache: False casts anew at each use, for a block that mixes forwards with and without gradients: a copy cached
            under ``no_grad`` has no graph. True leaves the caller's setting, for a block that uses each weight many
            times, as decoding does.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(enabled and cache)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(enabled)
