"""A linear layer with an exact GELU behind it: one Triton kernel (`kernel`) and its launcher (`launch`).

Importing this folder imports nothing: the kernel needs Triton only, the launcher needs torch as well.
"""
