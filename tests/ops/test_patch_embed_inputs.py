"""Bad arguments of `patch_embed`, memory accesses, NaN and threads."""

import pytest
import torch

import beit_fast
from beit_fast.ops import validation
from beit_fast.ops.arguments import PatchEmbedArguments
from beit_fast.ops.fallback import patch_embed as fallback

from ..support.patch_embedding import convolution, make_inputs

operator = torch.ops.beit_fast.patch_embed.default

BAD_INPUTS = {
    "pixels of three dimensions": (
        {"pixels": torch.zeros(3, 8, 8)},
        "pixels must be [B, C, H, W] and weight [E, C, patch height, patch width]",
    ),
    "a weight of two dimensions": (
        {"weight": torch.zeros(6, 48)},
        "pixels must be [B, C, H, W] and weight [E, C, patch height, patch width]",
    ),
    "a patch without pixels": (
        {"weight": torch.zeros(6, 3, 0, 4)},
        "weight must have at least one channel, row and column",
    ),
    "wrong channels": (
        {"pixels": torch.zeros(2, 4, 8, 8), "mean": None, "std": None},
        "pixels have 4 channels, weight takes 3",
    ),
    "a patch larger than the image": ({"pixels": torch.zeros(2, 3, 8, 3)}, "the image is smaller than one patch"),
    "uint8 without mean and std": (
        {"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "mean": None, "std": None},
        "uint8 pixels need mean and std",
    ),
    "uint8 without mean": (
        {"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "mean": None},
        "uint8 pixels need mean and std",
    ),
    "pixels of int32": (
        {"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.int32)},
        "pixels must be uint8, float16, bfloat16, float32 or float64",
    ),
    "pixels of float8": (
        {"pixels": torch.zeros(2, 3, 8, 8, dtype=torch.float8_e5m2)},
        "pixels must be uint8, float16, bfloat16, float32 or float64",
    ),
    "a complex weight": (
        {"weight": torch.zeros(6, 3, 4, 4, dtype=torch.complex64)},
        "weight must be float16, bfloat16, float32 or float64",
    ),
    "integer tokens": (
        {"cls": torch.zeros(6, dtype=torch.int64), "pos": torch.zeros(1, 5, 6, dtype=torch.uint8)},
        "cls must be float16, bfloat16, float32 or float64; pos must be float16, bfloat16, float32 or float64",
    ),
    "short mean and std": (
        {"mean": [0.5], "std": [1.0, 1.0]},
        "mean must have one number for each of the 3 channels; std must have one number for each of the 3 channels",
    ),
    "a zero in std": ({"std": [1.0, 0.0, 1.0]}, "std must not contain 0"),
    "a short bias": ({"bias": torch.zeros(5)}, "bias must hold 6 numbers, as weight has 6 output channels"),
    "a short cls": ({"cls": torch.zeros(1, 1, 7)}, "cls must hold 6 numbers, as weight has 6 output channels"),
    "a mask without mask token": ({"mask_token": None}, "mask and mask_token go together: give both or neither"),
    "a mask token without mask": ({"mask": None}, "mask and mask_token go together: give both or neither"),
    "a mask of another shape": ({"mask": torch.ones(2, 5).bool()}, "mask must be bool [B, patches] = [2, 4]"),
    "a mask of numbers": ({"mask": torch.ones(2, 4)}, "mask must be bool [B, patches] = [2, 4]"),
    "positions without one for CLS": ({"pos": torch.zeros(1, 4, 6)}, "pos must be [1, tokens, E] = [1, 5, 6]"),
    "a weight on another device": (
        {"weight": torch.zeros(6, 3, 4, 4, device="meta")},
        "all tensors must be on one device",
    ),
    "a mask on another device": (
        {"mask": torch.ones(2, 4, device="meta").bool()},
        "all tensors must be on one device",
    ),
    "all at once": (
        {"pixels": torch.zeros(2, 1, 3, 8, dtype=torch.uint8), "std": None, "mask": None, "bias": torch.zeros(1)},
        "pixels have 1 channels, weight takes 3; the image is smaller than one patch; "
        "mean must have one number for each of the 1 channels; uint8 pixels need mean and std; "
        "bias must hold 6 numbers, as weight has 6 output channels; "
        "mask and mask_token go together: give both or neither",
    ),
}


def described(arguments):
    return ", ".join(
        f"{name} {str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor)
    )


def python_checks(*arguments):
    given = PatchEmbedArguments(*arguments)
    validation.raise_errors("patch_embed", validation.patch_embed_errors(given), given)


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_patch_embed_bad_arguments_raise_every_reason(name):
    changes, reasons = BAD_INPUTS[name]
    arguments = make_inputs((8, 8), (4, 4), embed=6) | changes
    expected = f"beit_fast::patch_embed cannot serve {described(arguments)}: {reasons}"
    for check in (beit_fast.patch_embed, python_checks):
        with pytest.raises(ValueError, match="cannot serve") as error:
            check(*arguments.values())
        assert str(error.value) == expected
    with pytest.raises(ValueError, match=r"^beit_fast::patch_embed"):  # C++ names the first error only
        operator(*arguments.values())


def test_patch_embed_training_bad_arguments_raise_same_error():
    arguments = make_inputs((8, 8), (4, 4), embed=6) | {"mask": None}
    arguments["weight"].requires_grad_()
    with pytest.raises(ValueError, match="mask and mask_token go together"):
        beit_fast.patch_embed(**arguments)


@pytest.mark.parametrize("absent", ["mean", "std"])
def test_patch_embed_float_pixels_without_mean_or_std_match_convolution(absent):
    arguments = make_inputs((8, 8), (4, 4), embed=6, dtype=torch.float64, pixel_dtype=torch.float64, absent=(absent,))
    expected = convolution(**arguments)
    torch.testing.assert_close(beit_fast.patch_embed(**arguments), expected)
    torch.testing.assert_close(fallback.patch_embed(PatchEmbedArguments(**arguments)), expected)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (0, 3, 4, 4)])
def test_patch_embed_empty_batch_returns_empty(shape):
    arguments = make_inputs((8, 8), (4, 4), embed=6)
    pixels = torch.zeros(shape, requires_grad=True)
    patches = shape[2] * shape[3] // 16
    arguments |= {"pixels": pixels, "mask": torch.ones(0, patches).bool(), "pos": torch.zeros(1, patches + 1, 6)}
    weight = arguments["weight"].requires_grad_()
    tokens = beit_fast.patch_embed(**arguments)
    assert tokens.shape == (0, patches + 1, 6)
    grad_pixels, grad_weight = torch.autograd.grad(tokens.sum(), (pixels, weight))
    assert grad_pixels.shape == shape
    assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_patch_embed_zero_output_channels_return_empty():
    arguments = make_inputs((8, 8), (4, 4), embed=0)
    assert beit_fast.patch_embed(**arguments).shape == (2, 5, 0)


def test_patch_embed_meta_tensors_return_shapes():
    pixels = torch.empty(2, 3, 9, 13, device="meta")
    weight = torch.empty(6, 3, 4, 4, device="meta", dtype=torch.bfloat16)
    tokens = beit_fast.patch_embed(pixels, weight, cls=torch.empty(6, device="meta"))
    assert (tokens.shape, tokens.dtype, tokens.device.type) == ((2, 7, 6), torch.float32, "meta")


def test_patch_embed_strided_arguments_match_contiguous():
    arguments = make_inputs((8, 12), (4, 4), embed=6, dtype=torch.float64, pixel_dtype=torch.float64)
    expected = beit_fast.patch_embed(**arguments)

    def sliced(x):
        room = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        return room[..., 1::2].copy_(x)

    slices = {name: sliced(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    assert not slices["weight"].is_contiguous()
    torch.testing.assert_close(beit_fast.patch_embed(**slices), expected)
    channels_last = arguments | {"weight": arguments["weight"].contiguous(memory_format=torch.channels_last)}
    torch.testing.assert_close(beit_fast.patch_embed(**channels_last), expected)
    one_position = arguments | {"pos": arguments["pos"][:, :1].expand(-1, 7, -1)}
    materialized = arguments | {"pos": one_position["pos"].contiguous()}
    assert torch.equal(beit_fast.patch_embed(**one_position), beit_fast.patch_embed(**materialized))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
def test_patch_embed_leaves_inputs_unchanged(layout, dtype):
    arguments = make_inputs((19, 35), (16, 16), dtype=dtype, pixel_dtype=dtype, layout=layout)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    beit_fast.patch_embed(**arguments)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


def test_patch_embed_ignores_pixels_outside_patches():
    """Pixels outside the patches and memory around the image are NaN."""
    room = torch.full((2, 5, 30, 40), float("nan"))
    pixels = room[:, 1:4, 3:20, 5:30]  # 17 x 25, with patches of 8 x 8
    pixels[:, :, :16, :24] = torch.randn(2, 3, 16, 24)
    arguments = make_inputs((17, 25), (8, 8)) | {"pixels": pixels}
    assert torch.isfinite(beit_fast.patch_embed(**arguments)).all()


@pytest.fixture
def _nan_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_nan_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("embed", [1, 33, 96])
def test_patch_embed_writes_every_token(embed, dtype):
    assert torch.utils.deterministic.fill_uninitialized_memory
    for absent in ((), ("cls",), ("mask", "mask_token", "pos")):
        arguments = make_inputs((35, 70), (16, 16), batch=3, embed=embed, dtype=dtype, absent=absent)
        assert torch.isfinite(beit_fast.patch_embed(**arguments)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patch_embed_nan_stays_in_its_token(dtype):
    arguments = make_inputs((16, 16), (4, 4), dtype=dtype, pixel_dtype=dtype, absent=("mask", "mask_token"))
    arguments["pixels"][1, 0, 5, 9] = float("nan")
    tokens = beit_fast.patch_embed(**arguments)
    assert torch.isnan(tokens[1, 1 + 4 + 2]).all()
    assert torch.isnan(tokens).any(-1).sum() == 1


def test_patch_embed_mask_token_replaces_nan():
    arguments = make_inputs((8, 8), (4, 4))
    arguments["pixels"].fill_(float("nan"))
    arguments["mask"].fill_(True)
    assert torch.isfinite(beit_fast.patch_embed(**arguments)).all()


def test_patch_embed_offsets_beyond_32_bits_match_contiguous():
    """Use strides beyond 32 bits for dimensions of size 1."""
    storage = torch.randn(2 * 8 * 8)
    far = 2**33
    pixels = torch.as_strided(storage, (1, 1, 8, 8), (far, far, 8, 1))
    arguments = make_inputs((8, 8), (4, 4), batch=1, channels=1) | {"pixels": pixels}
    expected = arguments | {"pixels": pixels.clone(memory_format=torch.contiguous_format)}
    assert torch.equal(beit_fast.patch_embed(**arguments), beit_fast.patch_embed(**expected))


def test_patch_embed_between_matmuls_returns_same_bits():
    """Each function must configure the tile registers that it uses."""
    arguments = make_inputs((64, 64), (16, 16), embed=96, dtype=torch.bfloat16, pixel_dtype=torch.bfloat16)
    left, right = torch.randn(70, 200).bfloat16(), torch.randn(200, 90).bfloat16()
    tokens, product = beit_fast.patch_embed(**arguments), left @ right
    for _ in range(5):
        assert torch.equal(beit_fast.patch_embed(**arguments), tokens)
        assert torch.equal(left @ right, product)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "image"), [(1, (64, 64)), (3, (70, 51)), (5, (224, 224))], ids=str)
def test_patch_embed_any_threads_return_same_bits(batch, image, dtype):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("beit_fast::patch_embed", "CPU"):
        pytest.skip("the fallback runs PyTorch matmuls, whose sums depend on the threads")
    arguments = make_inputs(image, (16, 16), batch=batch, embed=200, dtype=dtype)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(beit_fast.patch_embed(**arguments))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
