"""Triton kernels compiled before there is a GPU: record what a run would JIT, compile it, and send the cache along.

On a machine without a GPU, in an environment with the Python and the Triton of the machine that has one::

    python -m tools.triton_cache record --out tests.json -- -m pytest -n 2 tests/kernels/device tests/losses/device
    python -m tools.triton_cache compile tests.json --cache build/triton
    python -m tools.triton_cache pack kernels.tar.xz --cache build/triton

and before the run on the GPU::

    python -m tools.triton_cache unpack kernels.tar.xz --cache build/triton
    export TRITON_CACHE_DIR=... TRITON_CACHE_SETTLED_KEYS=1 PYTHONPATH=...    # as unpack prints it; see ``keys``
    python -m ...

``record`` takes the arguments of any Python command, whose subprocesses (those of pytest-xdist too) are recorded as
well: see ``recording``, also for what it cannot see. Tests that ended early may ask for more variants than were
recorded; they are listed. ``check --cache DIR -- ...`` runs such a command on the JIT's own path against a cache, only
without launching, and fails if the JIT compiles anything.

The environment needs no GPU and no CUDA: PyTorch in any build of the version in question (its CPU build, or the
default one), then Triton, since PyTorch may have brought another::

    python3.12 -m venv env
    env/bin/pip install torch==2.11.0 numpy transformers pytest pytest-xdist pytest-benchmark
    env/bin/pip install triton==3.6.0 && env/bin/pip install --no-deps -e .

**Why a stale cache does no harm.** Triton finds a kernel by a hash of its source and of all functions and constants
that it uses, its argument types, alignments and constants, its launch options, the target, ptxas, and Triton itself:
the frontend and ``libtriton.so``, which differs from one Python version to the next. What differs in any of these is
not found, and is compiled as usual. A pack from another commit or for another Triton costs that time and never a wrong
result; ``unpack`` says in what the two differ. Launchers, the C code between Python and a kernel, are found by their
source in the same way. Packs hold native code: unpack only those of your own making.
"""
