"""Masked image modeling by other people's loops: the tests for Transformers 5."""

from ..integrations.test_masked_image_modeling import *  # noqa: F403
from ..integrations.test_masked_image_modeling import _registered as _registered
