"""Checks of every public loss against float64: ``python -m pytest benchmarks/checks -n auto``, on a GPU if possible.

One file for each family of losses. ``samples`` makes the inputs, ``closeness`` says which errors are accepted,
``check`` is one check, and ``benchmarks.definitions`` the reference.
"""
