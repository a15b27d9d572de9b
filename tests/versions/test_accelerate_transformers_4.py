"""`accelerate` on Transformers 4.57: the tests for 5.x, and head masks, which only 4.57 supports."""

import pytest
import torch

from ..integrations.test_accelerate_transformers import *  # noqa: F403
from ..integrations.test_accelerate_transformers_changed import *  # noqa: F403
from ..integrations.test_accelerate_transformers_compiled import *  # noqa: F403
from ..integrations.test_accelerate_transformers_masks import *  # noqa: F403
from ..integrations.test_accelerate_transformers_modules import *  # noqa: F403
from ..integrations.test_forward_scope_transformers import *  # noqa: F403
from ..support.oracle import relative_error
from ..support.transformers_models import Spy, assert_same, inputs_for, pair, run


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["BeitModel", "Data2VecVisionModel"])
def test_accelerate_head_mask_runs_transformers_attention(name, attn_implementation):
    theirs, ours = pair(name, "both", attn_implementation=attn_implementation)
    heads = torch.tensor([1.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    inputs = inputs_for(name, theirs) | {"head_mask": heads}
    with Spy(heads=4, tokens=17) as spy:
        assert_same(run(ours, inputs), run(theirs, inputs))
    assert spy.forward_calls == 0
    whole = ours(pixel_values=inputs["pixel_values"]).last_hidden_state
    assert relative_error(ours(**inputs).last_hidden_state, whole) > 1e-2
