"""The implementations that are measured: caop_fast and those it is compared with, each a ``Peer``.

``peer.py`` is the interface; one file each has ours, plain PyTorch, the loss of the released trainer, liger-kernel,
trl, and the cross-entropies of other packages. A package is imported only when one of its losses is built.
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

__all__ = ["ALL", "Loss", "Peer", "for_case", "named"]


def named(name: str) -> Peer:
    """The implementation of that name."""
    return next(peer for peer in ALL if peer.name == name)


def for_case(case: Case, *, quick: bool = False) -> list[Peer]:
    """Those with a loss for the suite of ``case``, ours first; ``quick``: only one that is compiled."""
    return [p for p in ALL if case.suite in p.suites and not (quick and p.name == "official-compiled")]
