"""Timing and memory measurement for benchmarks, examples and tests; not imported by the package."""
