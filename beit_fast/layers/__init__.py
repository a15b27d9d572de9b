"""Layers of BEiT, under the module and parameter names of the checkpoints on the hub."""

from .block import (
    BeitAttention,
    BeitDropPath,
    BeitEmbeddings,
    BeitEncoder,
    BeitIntermediate,
    BeitLayer,
    BeitOutput,
    BeitPatchEmbeddings,
    BeitRelativePositionBias,
    BeitSelfAttention,
    BeitSelfOutput,
    window_of,
)

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
