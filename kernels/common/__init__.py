"""What the kernels of every folder use: facts about GPUs (`gpu`), the device of a tensor (`device`), device functions.

Importing this folder imports nothing.
"""
