"""Makes `benchmarks` importable before the tests are collected."""

from __future__ import annotations

from ..support.benchmarks import import_benchmarks

import_benchmarks()
