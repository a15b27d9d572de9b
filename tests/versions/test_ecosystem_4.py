"""Trainer, pipelines, PEFT and `device_map`: the tests for Transformers 5."""

from ..integrations.test_ecosystem import *  # noqa: F403
from ..integrations.test_ecosystem import _unregistered as _unregistered
