"""Loading and saving checkpoints: Transformers, timm, unilm and mmsegmentation formats."""

from .files import HubOptions
from .loading import LoadOptions, load_model, save_model

__all__ = ["HubOptions", "LoadOptions", "load_model", "save_model"]
