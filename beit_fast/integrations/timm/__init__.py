"""timm's BEiT, accelerated in place or converted."""

from ..report import AccelerationReport
from .accelerate import accelerate, restore
from .conversion import from_timm, to_timm

__all__ = ["AccelerationReport", "accelerate", "from_timm", "restore", "to_timm"]
