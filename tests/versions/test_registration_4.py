"""`register()`: the tests for Transformers 5."""

from ..integrations.test_registration import *  # noqa: F403
from ..integrations.test_triton_in_transformers import *  # noqa: F403
