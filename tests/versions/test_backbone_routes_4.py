"""Every integration with dense-prediction models: the tests for Transformers 5."""

from ..integrations.test_backbone_routes import *  # noqa: F403
