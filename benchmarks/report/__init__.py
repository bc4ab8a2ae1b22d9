"""RESULTS.md and its plots, made from the records in results/; no number in it is written by hand.

    python -m benchmarks.report                                 benchmarks/RESULTS.md, benchmarks/results/plots/*.png
    python -m benchmarks.report --check                         exit code 1 if RESULTS.md differs from the records
    python -m benchmarks.report --results DIR --out FILE        elsewhere; plots are written to DIR/plots

The same records give the same bytes on every machine.
"""
