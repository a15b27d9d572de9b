"""The launcher: launched kernels, grids, tiles and precision."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import triton
import triton.language as tl

from beit_fast.kernels.attention import configs, inputs, launch
from beit_fast.kernels.attention.primitives import head_base, patch_base
from beit_fast.kernels.common import device as device_facts
from beit_fast.kernels.common import gpu

from .cases import check_parity, device, make_case, run_backward, run_forward


class Recorder:
    """Fake kernels that record their launches and grids."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: list[tuple[str, tuple[int, ...]]] = []
        modules = (launch.forward, launch.backward_preprocess, launch.backward_dkv, launch.backward_dq)
        for module in (*modules, launch.backward_dbias, inputs.pack_bias):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, _Launch(name.removesuffix("_kernel"), self.launched))


class _Launch:
    arg_names = ()

    def __init__(self, name: str, launched: list[tuple[str, tuple[int, ...]]]) -> None:
        self.name = name
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]):
        self.launched.append((self.name, grid))
        return lambda *positional, **named: None


ALWAYS = ["backward_preprocess"]
TABLE = ["dbias_cls_column", "backward_dbias", "dtable_patches", "dtable_cls"]


@pytest.mark.parametrize(
    ("output_mask", "expected"),
    [
        ((True, False, False, False), [*ALWAYS, "pack_bias", "backward_dq"]),
        ((False, True, False, False), [*ALWAYS, "pack_bias", "backward_dkv"]),
        ((False, False, True, False), [*ALWAYS, "pack_bias", "backward_dkv"]),
        ((False, False, False, True), [*ALWAYS, "pack_bias", *TABLE]),
        ((True, False, False, True), [*ALWAYS, "pack_bias", "backward_dq", *TABLE]),
        ((False, False, False, False), []),
    ],
)
def test_backward_output_mask_launches_only_needed_kernels(
    output_mask: tuple[bool, bool, bool, bool], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case((2, 2))
    out, lse = run_forward(case)
    recorder = Recorder(monkeypatch)
    run_backward(case, out, lse, output_mask)
    assert [name for name, _ in recorder.launched] == expected


def test_attention_above_65535_planes_uses_first_grid_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA limits y and z to 65535: fla-org/flash-linear-attention#172, flashinfer-ai/flashinfer#3125."""
    recorder = Recorder(monkeypatch)
    planes = 70_000
    case = make_case((1, 1), torch.float16, batch=planes // 2, heads=2, head_dim=8)
    out, lse = run_forward(case)
    run_backward(case, out, lse)
    assert all(len(grid) == 1 for _, grid in recorder.launched)
    whole = {name for name, grid in recorder.launched if grid[0] == planes}
    assert whole == {"attention_forward", "backward_dkv", "backward_dq", "dbias_cls_column"}


@pytest.mark.parametrize(
    ("setting", "dtype", "precision"),
    [
        ("highest", torch.float32, "ieee"),
        ("high", torch.float32, "tf32"),
        ("high", torch.bfloat16, "ieee"),
    ],
)
def test_dot_precision_follows_torch_setting(setting: str, dtype: torch.dtype, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert device_facts.dot_precision(torch.empty(1, dtype=dtype)) == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_signed_word_returns_signed_32_bit_integer(seed: int) -> None:
    word = inputs.signed_word(seed)
    assert -(2**31) <= word < 2**31
    assert word % 2**32 == seed


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
def test_select_every_kernel_and_head_dim_returns_tile(capability: tuple[int, int]) -> None:
    architecture = gpu.architecture_class(*capability)
    choices = itertools.product(configs.KERNELS, range(8, 129, 8), gpu.ARITHMETICS, (False, True))
    for kernel, head_dim, multiplies, dropout in choices:
        block_d = configs.padded_head_dim(head_dim)
        assert block_d >= max(16, head_dim)
        config = configs.select(kernel, architecture, block_d, multiplies, dropout)
        assert min(config.block_m, config.block_n) >= 16
        assert max(config.block_m, config.block_n) <= 128, "the margin of the packed bias is 128 columns"


@pytest.mark.parametrize("architecture", list(gpu.SHARED_MEMORY_LIMIT))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.skipif(
    device().type == "cuda", reason="other tests run the tiles of this GPU; tiles of other GPUs may not fit"
)
def test_attention_gpu_tiles_match_oracle(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiles_of_gpu(kernel: str, call: inputs.AttentionInputs, form: str | None = None) -> configs.TileConfig:
        arithmetic = gpu.arithmetic(call.query.element_size(), "ieee")
        return configs.select(kernel, architecture, call.block_d, arithmetic, call.dropout_p > 0)

    monkeypatch.setattr(launch, "tile_config", tiles_of_gpu)
    check_parity(make_case((10, 15), dtype, batch=2, heads=1, head_dim=64))


@triton.jit
def bases_kernel(tensor, result, batch_index, head_index, start, strides):
    head = head_base(tensor, tl.cast(batch_index, tl.int64), tl.cast(head_index, tl.int64), strides)
    tl.store(result, head.to(tl.int64) - tensor.to(tl.int64))
    tl.store(result + 1, patch_base(head, start, strides).to(tl.int64) - head.to(tl.int64))


@pytest.mark.parametrize(
    ("batch", "head", "start", "strides"),
    [
        (3, 0, 0, (2**30, 768, 64)),
        (40_000, 11, 196, (197 * 2304, 2304, 64)),
        (0, 0, 5000, (2**31 - 1, 2**20, 64)),
        (0, 7, 0, (8, 8, 2**29)),
        (2, 1, 3, (2**40, 2**35, 2**33)),
    ],
)
def test_head_base_and_patch_base_do_not_wrap_at_32_bits(
    batch: int, head: int, start: int, strides: tuple[int, int, int]
) -> None:
    """Check the arithmetic of offsets, without the memory.

    Bugs elsewhere: fla-org/flash-linear-attention#1080, linkedin/Liger-Kernel#1335.
    """
    result = torch.zeros(2, dtype=torch.int64, device=device())
    bases_kernel[(1,)](torch.zeros(1, dtype=torch.float16, device=device()), result, batch, head, start, strides)
    expected = [batch * strides[0] + head * strides[2], (start + 1) * strides[1]]
    assert max(expected) > 2**31
    assert (result // 2).tolist() == expected
