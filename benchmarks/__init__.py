"""Benchmarks against the implementations in use today: `pytest benchmarks/`, see README.md."""
