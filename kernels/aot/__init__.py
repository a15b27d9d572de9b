"""Compile the kernels without a GPU and inspect the result: resources, machine code, register layouts.

Benchmarks and tests import this folder from the checkout; it is not in the wheel. Importing it imports nothing.
"""
