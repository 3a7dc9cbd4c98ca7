"""Measurements of the operations: ``python -m bench.run``. Nothing imports this package; rules are in TRAPS.md."""
