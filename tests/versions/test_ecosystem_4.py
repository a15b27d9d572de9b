"""Trainer, pipelines, PEFT and `device_map`, as tested with Transformers 5."""

from ..test_ecosystem import *  # noqa: F403
from ..test_ecosystem import _unregistered as _unregistered
