"""BEiT whose relative position bias is read inside fused attention kernels.

The model is described in arXiv 2106.08254.
"""

from typing import TYPE_CHECKING, Any

from . import ops as ops
from .configuration import BeitConfig
from .models.backbone import BeitBackbone
from .models.base import BeitPreTrainedModel
from .models.beit import BeitForImageClassification, BeitForMaskedImageModeling, BeitModel
from .models.outputs import BeitModelOutputWithPooling
from .models.segmentation import BeitForSemanticSegmentation
from .ops.attention import rel_pos_attention
from .ops.patch_embed import patch_embed
from .utils.first_use import import_at_first_use
from .utils.version import __version__

if TYPE_CHECKING:
    from .image_processing import BeitFeatureExtractor, BeitImageProcessor, BeitImageProcessorFast
    from .inference import (
        ClassScore,
        ImageClassifier,
        optimize_for_inference,
        plot_attention,
        plot_relative_position_bias,
    )

_IMPORTED_AT_FIRST_USE = {
    "BeitFeatureExtractor": ".image_processing",
    "BeitImageProcessor": ".image_processing",
    "BeitImageProcessorFast": ".image_processing",
    "ClassScore": ".inference",
    "ImageClassifier": ".inference",
    "optimize_for_inference": ".inference",
    "plot_attention": ".inference",
    "plot_relative_position_bias": ".inference",
}


def __getattr__(name: str) -> Any:
    """Import a name that models do not need, at its first use."""
    return import_at_first_use(__name__, _IMPORTED_AT_FIRST_USE, name)


def __dir__() -> list[str]:
    return sorted(__all__)


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
    "ClassScore",
    "ImageClassifier",
    "__version__",
    "optimize_for_inference",
    "patch_embed",
    "plot_attention",
    "plot_relative_position_bias",
    "rel_pos_attention",
]
