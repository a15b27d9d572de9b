"""Configuration of all BEiT models."""

from .beit_config import BeitConfig

__all__ = ["BeitConfig"]
