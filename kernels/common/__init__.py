"""Code that the kernels of every folder use: GPU facts, the device of a tensor, launching, device functions.

Importing this folder imports nothing.
"""
