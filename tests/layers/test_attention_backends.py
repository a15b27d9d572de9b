"""Parity of the attention backends."""

import pytest
import torch

from beit_fast.layers.attention_backends import eager_attention, run_attention
from beit_fast.utils.names import ATTENTION_IMPLEMENTATIONS

from ..support.cases import attention_case
from ..support.oracle import attention_oracle


@pytest.mark.parametrize("backend", ATTENTION_IMPLEMENTATIONS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_run_attention_every_backend_matches_oracle(backend, biased, masked):
    """The last sample masks every key, and must give zeros and finite gradients."""
    case = attention_case((3, 5), torch.float64, batch=3, biased=biased, masked=masked)
    inputs = (case.query, case.key, case.value, case.table, case.window, case.key_mask)
    out = run_attention(backend, *inputs)
    expected = attention_oracle(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-8)
    grads = torch.autograd.grad(out, case.leaves(), case.grad_out)
    for grad, wanted in zip(grads, torch.autograd.grad(expected, case.leaves(), case.grad_out), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=1e-8)
    if masked:
        assert torch.equal(out[-1], torch.zeros_like(out[-1]))


@pytest.mark.parametrize("backend", ATTENTION_IMPLEMENTATIONS)
def test_run_attention_dropout_follows_seed_and_preserves_mean(backend):
    case = attention_case((4, 4), batch=4, heads=4)
    inputs = (case.query, case.key, case.value, case.table, case.window)

    def run(seed):
        torch.manual_seed(seed)
        return run_attention(backend, *inputs, dropout_p=0.25)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    plain = run_attention(backend, *inputs)
    average = torch.stack([run(seed) for seed in range(400)]).mean(0)
    assert (average - plain).norm() / plain.norm() < 3 * (0.25 / 0.75 / 400) ** 0.5 * 2


def test_eager_attention_weights_times_values_equal_output():
    case = attention_case((3, 4))
    out, weights = eager_attention(case.query, case.key, case.value)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, case.value)
    torch.testing.assert_close(out, mixed)
