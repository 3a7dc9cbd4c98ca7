"""Where the package's code lies; everything else about it is in pyproject.toml."""

from setuptools import setup

setup()
