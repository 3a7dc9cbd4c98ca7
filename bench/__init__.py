"""Measurements: ``python -m bench.run`` of single operations, ``bench.step`` of whole steps.

Nothing imports this package; rules are in TRAPS.md.
"""
