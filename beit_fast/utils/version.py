"""The package's version, read by setuptools without importing torch."""

__version__ = "0.1.0"
