"""BEiT (arXiv 2106.08254) with its relative position bias read inside fused attention kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from . import compile_cache as compile_cache
from . import flops as flops
from . import sharding as sharding
from . import transforms as transforms
from ._version import __version__
from .backbone import BeitBackbone
from .configuration import BeitConfig
from .functional import patch_embed, rel_pos_attention
from .inference import optimize_for_inference
from .modeling import BeitForImageClassification, BeitForMaskedImageModeling, BeitModel
from .outputs import BeitModelOutputWithPooling
from .pretrained import BeitPreTrainedModel
from .segmentation import BeitForSemanticSegmentation

if TYPE_CHECKING:
    from .image_processing import BeitFeatureExtractor, BeitImageProcessor
    from .image_processing_fast import BeitImageProcessorFast

_IMAGE_PROCESSORS = {
    "BeitFeatureExtractor": "image_processing",
    "BeitImageProcessor": "image_processing",
    "BeitImageProcessorFast": "image_processing_fast",
}


def __getattr__(name: str) -> Any:
    """Import an image processor when it is asked for: a model needs none."""
    if name not in _IMAGE_PROCESSORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_IMAGE_PROCESSORS[name]}", __name__), name)


__all__ = [
    "BeitBackbone",
    "BeitConfig",
    "BeitFeatureExtractor",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation",
    "BeitImageProcessor",
    "BeitImageProcessorFast",
    "BeitModel",
    "BeitModelOutputWithPooling",
    "BeitPreTrainedModel",
    "__version__",
    "optimize_for_inference",
    "patch_embed",
    "rel_pos_attention",
]
