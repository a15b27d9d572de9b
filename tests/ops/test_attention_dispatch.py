"""Dispatch of attention: names, kernels and the reasons of unsupported inputs."""

import re
from collections.abc import Callable

import pytest
import torch

from beit_fast.ops.dispatch import attention, availability

from ..support.devices import CPU_ATTENTION, DEFAULT_ATTENTION

CPU = torch.device("cpu")


def test_resolve_none_without_fused_kernel_is_sdpa():
    meta = torch.device("meta")
    assert attention.resolve(None, meta, torch.float32, 64) == "sdpa"
    assert attention.kernel_name(None, meta, torch.float32, 64) == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kernel_name_of_none_is_native_kernel_if_loaded(dtype):
    assert attention.kernel_name(None, CPU, dtype, 64) == DEFAULT_ATTENTION
    assert attention.resolve(None, CPU, dtype, 64) == ("triton" if DEFAULT_ATTENTION == "cpp" else "sdpa")


def test_kernel_name_of_triton_on_cpu_is_cpu_kernel():
    assert attention.resolve("triton", CPU, torch.float32, 64) == "triton"
    assert attention.kernel_name("triton", "cpu", torch.float32, 64) == CPU_ATTENTION


def test_resolve_unknown_name_raises_with_choices():
    with pytest.raises(ValueError, match=r"'flash' is not supported \(expected 'eager', 'sdpa', 'triton' or None\)"):
        attention.resolve("flash", CPU, torch.float32, 64)


def test_resolve_unsupported_raises_with_every_reason():
    with pytest.raises(ValueError, match="attn_implementation='triton' cannot serve") as error:
        attention.resolve("triton", torch.device("xpu"), torch.int32, 65)
    text = str(error.value)
    for reason in (
        "torch.int32 with head dimension 65 on xpu",
        "triton: serves cuda tensors, not xpu; dtype torch.int32 is not supported "
        "(expected float16, bfloat16 or float32); head dimension 65 is not a multiple of 8 from 8 to 128",
        "triton-interpret: serves cpu tensors, not xpu; TRITON_INTERPRET=1 was not set",
        "cpp: serves cpu tensors, not xpu",
        "dtype torch.int32 is not supported (expected float16, bfloat16, float32 or float64)",
        "torch: serves cpu tensors, not xpu; dtype torch.int32 is not a floating-point type",
        "Use 'sdpa' or 'eager'",
    ):
        assert reason in text


def test_resolve_none_never_raises():
    assert attention.resolve(None, torch.device("xpu"), torch.float32, 65) == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks a machine without a GPU")
def test_resolve_on_missing_cuda_device_raises():
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        attention.resolve("triton", torch.device("cuda", 0), torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((10, 0), "3.7.1", "warps race in tensor memory; use torch 2.14 or later, which brings Triton 3.8.0"),
        ((10, 3), "3.6.0", "warps race in tensor memory; use torch 2.14 or later, which brings Triton 3.8.0"),
        ((11, 0), "3.9.0", "compute capability 11.0 is not supported"),
        ((10, 0), "3.8.0", None),
        ((9, 0), "3.6.0", None),
        ((8, 0), "3.6.0", None),
        ((12, 0), "3.9.0", None),
    ],
)
def test_kernels_for_gpu_with_faulty_compiler_are_refused(
    fake_gpu: Callable[[tuple[int, int], str], None],
    capability: tuple[int, int],
    version: str,
    reason: str | None,
) -> None:
    fake_gpu(capability, version)
    cuda = torch.device("cuda", 0)
    found = availability.attention_unsupported_reasons("triton", cuda, torch.bfloat16, 64)
    assert availability.linear_gelu_unsupported_reasons(cuda, torch.bfloat16, 64) == found
    # Kernels without matrix products have none of the faults.
    assert availability.residual_norm_unsupported_reasons(cuda, [torch.bfloat16], 64, 8) == ()
    if reason is None:
        assert found == ()
        assert attention.resolve(None, cuda, torch.bfloat16, 64) == "triton"
        return
    (text,) = found
    assert reason in text
    assert attention.resolve(None, cuda, torch.bfloat16, 64) == "sdpa"
    with pytest.raises(ValueError, match=f"triton: {re.escape(text)}"):
        attention.resolve("triton", cuda, torch.bfloat16, 64)


def test_describe_kernels_gives_reasons():
    rows = {name: (serves, reasons) for name, serves, reasons in attention.describe_kernels()}
    assert rows[CPU_ATTENTION] == (True, ())
    assert [name for name, (serves, _) in rows.items() if serves and name != "triton"] == [CPU_ATTENTION]
    assert all(serves == (not reasons) for serves, reasons in rows.values())
    on_cpu = {name: reasons for name, _, reasons in attention.describe_kernels("cpu")}
    assert "serves cuda tensors, not cpu" in on_cpu["triton"]


def test_report_str_is_readable():
    report = attention.report("triton", [CPU_ATTENTION, None], CPU, torch.float32, 64)
    assert report.kernel == CPU_ATTENTION
    assert "ran in 1 of 2 layers" in str(report)
    assert "triton: serves cuda tensors, not cpu" in str(report)
    idle = attention.report(None, [None], CPU, torch.float32, 64)
    assert idle.kernel == DEFAULT_ATTENTION
    assert "has not run yet, would run" in str(idle)
