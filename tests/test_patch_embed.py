"""`patch_embed` against the convolution it replaces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import beit_fast

from .support.oracle import assert_within_budget

operator = torch.ops.beit_fast.patch_embed.default


def inputs(image=(9, 13), patch=4, batch=2, channels=3, embed=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    patches = (image[0] // patch) * (image[1] // patch)
    return {
        "pixels": normal(batch, channels, *image),
        "weight": normal(embed, channels, patch, patch),
        "bias": normal(embed),
        "cls": normal(1, 1, embed),
        "mask": torch.rand(batch, patches, generator=generator) > 0.5,
        "mask_token": normal(1, 1, embed),
        "pos": normal(1, patches + 1, embed),
        "mean": [0.1 * (n + 1) for n in range(channels)],
        "std": [0.5 + 0.1 * n for n in range(channels)],
    }


def convolution(pixels, weight, bias=None, cls=None, mask=None, mask_token=None, pos=None, mean=None, std=None):
    """The chain of plain PyTorch operations that the operator stands for."""
    if mean is not None:
        pixels = pixels - pixels.new_tensor(mean)[:, None, None]
    if std is not None:
        pixels = pixels / pixels.new_tensor(std)[:, None, None]
    tokens = torch.nn.functional.conv2d(pixels, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if mask is not None:
        blend = mask.unsqueeze(-1).to(tokens.dtype)
        tokens = tokens * (1 - blend) + mask_token * blend
    if cls is not None:
        tokens = torch.cat([cls.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if pos is None else tokens + pos


def as_dtype(arguments, dtype):
    return {
        name: x.detach().to(dtype).requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def leaves(arguments):
    return [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tokens_and_gradients(dtype):
    arguments = as_dtype(inputs(), dtype)
    precise = as_dtype(arguments, torch.float64)
    reference, eager, tokens = (
        convolution(**precise),
        convolution(**arguments),
        beit_fast.patch_embed(**arguments),
    )
    assert tokens.dtype == dtype
    assert_within_budget("tokens", tokens.detach(), reference.detach(), eager.detach(), 2)
    cotangent = torch.randn_like(reference)
    expected = torch.autograd.grad(reference, leaves(precise), cotangent)
    reached = torch.autograd.grad(eager, leaves(arguments), cotangent.to(dtype))
    for grad, wanted, plain in zip(
        torch.autograd.grad(tokens, leaves(arguments), cotangent.to(dtype)), expected, reached, strict=True
    ):
        assert_within_budget("gradient", grad, wanted, plain, 3)


@given(
    st.tuples(st.integers(4, 20), st.integers(4, 20)),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_drawn_shapes_and_options(image, patch, channels, with_cls, with_mask):
    arguments = inputs(image, patch, channels=channels)
    if not with_cls:
        arguments["cls"], arguments["pos"] = None, None
    if not with_mask:
        arguments["mask"], arguments["mask_token"] = None, None
    torch.testing.assert_close(beit_fast.patch_embed(**arguments), convolution(**arguments))


def test_uint8_pixels_are_normalised_in_their_own_units():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    arguments = inputs((8, 8)) | {"mean": [127.5] * 3, "std": [127.5] * 3}
    expected = convolution(**(arguments | {"pixels": pixels.double()}))
    torch.testing.assert_close(beit_fast.patch_embed(**(arguments | {"pixels": pixels})), expected)


def test_channels_last_pixels():
    arguments = inputs()
    expected = beit_fast.patch_embed(**arguments)
    arguments["pixels"] = arguments["pixels"].detach().to(memory_format=torch.channels_last)
    torch.testing.assert_close(beit_fast.patch_embed(**arguments), expected)


def test_gradcheck():
    arguments = inputs((5, 6), patch=2, batch=1, channels=1, embed=2)
    names = [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    assert torch.autograd.gradcheck(
        lambda *x: beit_fast.patch_embed(**(arguments | dict(zip(names, x, strict=True)))), leaves(arguments)
    )


def test_opcheck():
    arguments = as_dtype(inputs(), torch.float32)
    opcheck(operator, tuple(arguments.values()))
    bare = (arguments["pixels"], arguments["weight"], *[None] * 7)
    opcheck(operator, bare)


def test_autocast_keeps_the_residual_stream_in_the_dtype_of_cls():
    arguments = as_dtype(inputs(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert beit_fast.patch_embed(**arguments).dtype == torch.float32
        assert beit_fast.patch_embed(arguments["pixels"], arguments["weight"]).dtype == torch.bfloat16


@pytest.mark.parametrize("mapped", [{"pixels"}, {"pixels", "mask"}, {"pixels", "weight", "cls"}])
def test_vmap_equals_a_loop(mapped):
    arguments = inputs()
    stacks = {
        name: torch.stack([x, x.flip(0)]) if name in mapped else x
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor)
    }

    def embed(tensors):
        return beit_fast.patch_embed(**(arguments | tensors))

    result = torch.vmap(embed, ({name: 0 if name in mapped else None for name in stacks},))(stacks)
    for entry in range(2):
        single = {name: x[entry] if name in mapped else x for name, x in stacks.items()}
        torch.testing.assert_close(result[entry], embed(single))


def test_flop_formula():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = inputs()
    with FlopCounterMode(display=False) as counter:
        beit_fast.patch_embed(**arguments)
    assert counter.get_total_flops() == 2 * 2 * 6 * 6 * 3 * 4 * 4


def test_one_error_lists_every_reason():
    arguments = inputs() | {
        "mask_token": None,
        "mean": [0.5],
        "std": [0.0, 1.0, 1.0],
        "pos": torch.zeros(1, 3, 6),
    }
    with pytest.raises(ValueError, match="cannot serve") as error:
        beit_fast.patch_embed(**arguments)
    for reason in ("mask and mask_token go together", "mean must have one number", "std must not contain 0",
                   "pos must be [1, tokens, E] = [1, 7, 6]", "pixels float64[2, 3, 9, 13] on cpu"):  # fmt: skip
        assert reason in str(error.value)
