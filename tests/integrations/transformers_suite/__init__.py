"""Run Transformers' own tests of BEiT on this package: `make test-transformers-suite`."""
