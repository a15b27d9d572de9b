"""Residual, layer scale, drop path and LayerNorm as one Triton kernel.

The folder has the kernels (`forward`, `backward`) and a launcher (`launch`). Importing it imports nothing: the
kernels need Triton only, the launcher needs torch as well.
"""
