"""`register()` as tested with Transformers 5, where 4.x has what it takes."""

from ..integrations.test_registration import *  # noqa: F403
from ..integrations.test_triton_in_transformers import *  # noqa: F403
