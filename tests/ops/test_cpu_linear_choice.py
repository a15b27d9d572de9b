"""The choice of the GEMM for fp32 linear layers on CPU."""

import pytest
import torch
import torch.nn.functional as F

from beit_fast.ops.cpu_linear import choice, split_bf16


@pytest.mark.parametrize(
    ("identity", "capability", "mkl", "name", "reason"),
    [
        (("AuthenticAMD", 26), "AVX512", True, "onednn", "MKL runs AVX2 kernels on AMD CPUs, oneDNN AVX-512"),
        (("AuthenticAMD", 25), "AVX512", True, "blas", "AVX-512 is not wider than AVX2 on AMD CPUs of family 25"),
        (("AuthenticAMD", 26), "AVX2", True, "blas", "the CPU has no AVX-512"),
        (("AuthenticAMD", 26), "AVX512", False, "blas", "torch's BLAS is not MKL"),
        (("GenuineIntel", 6), "AVX512", True, "blas", "MKL is as fast as oneDNN on CPUs of GenuineIntel"),
    ],
)
def test_preferred_gemm_depends_on_cpu_unless_requested(monkeypatch, identity, capability, mkl, name, reason):
    monkeypatch.setattr(split_bf16, "unsupported_reason", lambda: "no tiles")
    monkeypatch.setattr(choice, "_cpu_identity", lambda: identity)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    decide = choice._preferred.__wrapped__
    assert (decide(None).name, decide(None).reason) == (name, reason)
    for requested in choice.GEMMS:
        assert decide(requested).name == requested
        assert (decide(requested).function is None) is (requested == "blas")
        assert f"BEIT_FAST_CPU_LINEAR={requested}" in decide(requested).reason
    monkeypatch.setattr(split_bf16, "unsupported_reason", lambda: None)
    assert decide(None).name == "split_bf16"
    assert "AMX" in decide(None).reason


def test_cpu_identity_reads_the_system():
    vendor, family = choice._cpu_identity()
    assert vendor
    assert family >= 0


def test_cpu_linear_with_any_gemm_matches_autograd():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    out = choice.CpuLinear.apply(x, weight, None, F.linear)
    assert torch.equal(out, F.linear(x, weight))
    grads = torch.autograd.grad(out.sum(), [x, weight])
    assert all(map(torch.equal, grads, torch.autograd.grad(F.linear(x, weight).sum(), [x, weight])))
