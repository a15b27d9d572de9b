"""Residual, layer scale, drop path and LayerNorm as one Triton kernel, forward and backward, and a launcher (`launch`).

Importing this folder imports nothing: the kernels need Triton only, the launcher needs torch as well.
"""
