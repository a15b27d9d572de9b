"""The benchmark house: `pytest benchmarks/` compares attention with what people use today. See README.md."""
