"""Loading and saving checkpoints: Transformers, timm, unilm and mmsegmentation formats."""

from ..utils.hub import HubOptions
from .loading import LoadOptions, load_model
from .saving import save_model

__all__ = ["HubOptions", "LoadOptions", "load_model", "save_model"]
