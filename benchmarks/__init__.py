"""Speed, memory and accuracy of caop_fast beside the code people use instead: same work, same inputs, same run.

    make bench-quick                       every suite on this CPU, within two minutes
    python -m pytest benchmarks            the suites under pytest-benchmark, on a GPU if there is one
    python -m benchmarks.gpu --out DIR     correctness, then everything, within a time budget, on a GPU
    python -m benchmarks.cpu               the recorded table of a CPU
    python -m benchmarks.report            RESULTS.md and its plots from the records in results/

``cases`` and ``inputs`` say what is measured, ``peers/`` what is compared, ``definitions`` and ``reference`` what is
right in float64, ``floors`` what is possible, ``measure`` how time and memory are measured. ``run`` measures one
implementation of a loss, ``step/`` one of a training step, ``campaign`` a list of cases, ``supervise`` survives a
process that dies, ``correctness`` runs ``checks/`` and the kernels' tests, and ``records`` are the results.
"""
