"""What is measured: caop_fast and the code it is compared with, each behind ``Peer``.

``peer.py`` is the interface, one file each holds ours, plain PyTorch, the official trainer's loss, liger-kernel, trl,
and the cross-entropies of other packages. A package is imported only when one of its losses is built.
"""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.peers import cross_entropy, liger, official, ours, plain, trl
from benchmarks.peers.peer import Loss, Peer

ALL: tuple[Peer, ...] = (
    *ours.PEERS,
    *official.PEERS,
    *plain.PEERS,
    *trl.PEERS,
    *liger.PEERS,
    *cross_entropy.PEERS,
)
BY_NAME = {peer.name: peer for peer in ALL}

__all__ = ["ALL", "BY_NAME", "Loss", "Peer", "for_case"]


def for_case(case: Case, *, quick: bool = False) -> list[Peer]:
    """Those with a loss for the suite of ``case``, ours first; ``quick`` without the second one that compiles."""
    return [p for p in ALL if case.suite in p.suites and not (quick and p.name == "official-compiled")]
