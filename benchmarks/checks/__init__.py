"""Checks of every public loss against float64: one file for each family of losses, and what they share.

``definitions`` says what is right, ``samples`` makes inputs, ``closeness`` says what is near enough, ``trial`` is one
check. ``benchmarks.correctness`` runs them.
"""
