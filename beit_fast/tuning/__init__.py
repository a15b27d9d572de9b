"""Self-test and tuning of the kernels on the user's device.

The timer and the fp64 reference are here too. Benchmarks, examples and tests import them from here.
Importing this folder imports nothing.
"""
