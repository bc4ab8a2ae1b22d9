"""Everything on a GPU box, in one command::

    python -m benchmarks.gpu --out results/ --minutes 25

checks every kernel and loss on the GPU, then times them beside the peers that are installed, most important first.
Needs torch, triton, numpy and pytest (transformers for the training step); run it from a checkout, with ``kernels/`` on
``PYTHONPATH`` where the project is not installed. Run again, it goes on where it stopped; where commands are cut off
after some time, give ``--minutes`` less than that. Peers are measured where they are installed: liger-kernel, trl (with
its datasets, which its kernels import), cut-cross-entropy, flash-attn. What dies or hangs is recorded as crashed, and
the run goes on in another process (``supervise``).
"""

from __future__ import annotations

import sys

from benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main(None, device="cuda", selection="gpu", minutes=25.0))
