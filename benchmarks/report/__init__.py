"""Pictures, tables and targets from the results of the benchmarks."""
