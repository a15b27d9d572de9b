"""Shapes, clocks, worker processes and result files of the benchmarks."""
