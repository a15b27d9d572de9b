"""Every way into the dense-prediction models, as tested with Transformers 5."""

from ..integrations.test_backbone_routes import *  # noqa: F403
