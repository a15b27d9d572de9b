"""A linear layer followed by an exact GELU: one Triton kernel (`kernel`) and its launcher (`launch`).

Importing this folder imports nothing: the kernel needs Triton only, the launcher needs torch as well.
"""
