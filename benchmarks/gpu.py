"""Everything on a machine with a GPU::

    python -m benchmarks.gpu --out results/ --minutes 25

checks every kernel and loss on the GPU, then measures them beside the installed peers, most important cases first. It
needs torch, triton, numpy, pytest and pytest-xdist (transformers for the training step); run it from a checkout, with
``kernels/`` on ``PYTHONPATH`` if the project is not installed. Run again, it resumes; if commands are killed after some
time, pass a smaller ``--minutes``. Peers: liger-kernel, trl (with datasets, which its kernels import),
cut-cross-entropy, flash-attn. An implementation that crashes or hangs is recorded as crashed, and the run goes on in
another process (``supervise``).
"""

from __future__ import annotations

import sys

from benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main(None, device="cuda", selection="gpu", minutes=25.0))
