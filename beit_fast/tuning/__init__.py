"""Self-test and tuning of the kernels on the device of a user, with their timer and fp64 reference.

Benchmarks, examples and tests take the timer and the reference from here. Importing this folder imports nothing.
"""
