"""Everything on a GPU box, in one command::

    python -m benchmarks.gpu --out results/ --minutes 25

checks every kernel and loss on the GPU, then times them beside the peers that are installed, most important first.
Needs torch, triton, numpy and pytest (transformers for the training step); run it from a checkout, with ``kernels/`` on
``PYTHONPATH`` where the project is not installed. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import sys

from benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main(None, device="cuda", selection="gpu", minutes=25.0))
