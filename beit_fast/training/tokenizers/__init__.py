"""Visual tokenizers: images to the ids that masked image modeling predicts."""

from .dalle import DalleTokenizer
from .patch_colors import PatchColorTokenizer
from .pretrained import PretrainedTokenizer
from .protocol import VisualTokenizer
from .registry import load_visual_tokenizer
from .vqkd import VQKDTokenizer

__all__ = [
    "DalleTokenizer",
    "PatchColorTokenizer",
    "PretrainedTokenizer",
    "VQKDTokenizer",
    "VisualTokenizer",
    "load_visual_tokenizer",
]
