"""Transformers' BEiT and Data2VecVision: accelerated in place, or built from this package's classes."""

import re

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "beit_fast.integrations.transformers needs Transformers 4.57 or later: pip install 'beit-fast[hf]'"
    ) from error
if [int(number) for number in re.findall(r"\d+", transformers.__version__)[:2]] < [4, 57]:
    raise ImportError(
        f"beit_fast.integrations.transformers needs Transformers 4.57 or later, and this is {transformers.__version__}"
    )

from ..report import AccelerationReport
from .accelerate import accelerate, restore
from .registration import register, unregister, with_transformers_outputs

__all__ = [
    "AccelerationReport",
    "accelerate",
    "register",
    "restore",
    "unregister",
    "with_transformers_outputs",
]
