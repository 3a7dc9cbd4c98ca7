"""The package's version, which pyproject.toml reads without importing torch."""

__version__ = "0.1.0"
