"""Attention with a relative position bias: Triton kernels (`forward`, `backward_*`) and a launcher (`launch`).

Importing this folder imports nothing: the kernels need Triton only, the launcher needs torch as well.
"""
