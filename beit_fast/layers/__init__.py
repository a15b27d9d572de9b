"""Layers of BEiT. Modules and parameters have the names of the checkpoints on the hub."""

from .attention import BeitAttention, BeitRelativePositionBias, BeitSelfAttention, BeitSelfOutput
from .block import BeitEncoder, BeitLayer
from .drop_path import BeitDropPath
from .embeddings import BeitEmbeddings, BeitPatchEmbeddings, window_of
from .mlp import BeitIntermediate, BeitOutput

__all__ = [
    "BeitAttention",
    "BeitDropPath",
    "BeitEmbeddings",
    "BeitEncoder",
    "BeitIntermediate",
    "BeitLayer",
    "BeitOutput",
    "BeitPatchEmbeddings",
    "BeitRelativePositionBias",
    "BeitSelfAttention",
    "BeitSelfOutput",
    "window_of",
]
