"""Everything is declared in pyproject.toml; native extensions will be added here when they land in csrc/."""

from setuptools import setup

setup()
