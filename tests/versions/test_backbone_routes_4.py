"""Every way into the dense-prediction models, as tested with Transformers 5."""

from ..test_backbone_routes import *  # noqa: F403
