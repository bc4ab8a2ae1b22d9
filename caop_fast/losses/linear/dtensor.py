"""Heads that are ``DTensor``s, as FSDP2 (``fully_shard``) leaves them: gathered once, reduced once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gathered(name: str, weight: Tensor, *, sharded: bool) -> Tensor:
    """A plain tensor of the whole of a ``DTensor``; anything else as it is.

    The ranks of its mesh hold different tokens, so their gradients are averaged over it, as FSDP2 averages those of its
    parameters: the full gradient of each rank is a partial sum that is reduced and scattered. (``full_tensor()`` alone
    takes it for a replica and keeps this rank's slice of this rank's gradient.) With ``sharded`` a ``process_group``
    shards the vocabulary, and a DTensor of another kind is an error.
    """
    if not _is_dtensor(weight):
        return weight
    from torch.distributed.tensor import Partial, Replicate, Shard

    data_parallel = all(isinstance(p, (Shard, Replicate)) for p in weight.placements) and (
        sum(isinstance(p, Shard) for p in weight.placements) <= 1
    )
    if sharded or not data_parallel:
        placed = f"{tuple(weight.placements)} on a mesh of shape {tuple(weight.device_mesh.shape)}"
        raise ValueError(
            f"{name} is a DTensor placed {placed}: "
            + (
                f"with process_group pass this rank's rows of it, {name}.to_local()"
                if sharded
                else "only heads sharded once over data-parallel ranks (FSDP2) are gathered; for tensor parallelism "
                f"pass {name}.to_local() and process_group"
            )
        )
    mesh = weight.device_mesh
    full = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad and torch.is_grad_enabled():
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def check_plain(tensors: dict[str, Any]) -> None:
    """Whatever belongs to tokens is this rank's own."""
    for name, tensor in tensors.items():
        if _is_dtensor(tensor):
            raise ValueError(
                f"{name} must be a plain tensor of this rank's tokens, got a DTensor placed "
                f"{tuple(tensor.placements)}: pass {name}.to_local(), or {name}.full_tensor() with process_group"
            )


def _is_dtensor(value: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
