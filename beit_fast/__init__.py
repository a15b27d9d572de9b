"""BEiT (arXiv 2106.08254) with its relative position bias read inside fused attention kernels."""

from . import flops as flops
from . import transforms as transforms
from ._version import __version__
from .backbone import BeitBackbone
from .configuration import BeitConfig
from .functional import patch_embed, rel_pos_attention
from .modeling import BeitForImageClassification, BeitForMaskedImageModeling, BeitModel
from .outputs import BeitModelOutputWithPooling
from .pretrained import BeitPreTrainedModel
from .segmentation import BeitForSemanticSegmentation

__all__ = [
    "BeitBackbone",
    "BeitConfig",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation",
    "BeitModel",
    "BeitModelOutputWithPooling",
    "BeitPreTrainedModel",
    "__version__",
    "patch_embed",
    "rel_pos_attention",
]
