"""`patch_embed` against the convolution: tokens, gradients and registrations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import beit_fast
from beit_fast.ops.arguments import PatchEmbedArguments
from beit_fast.ops.fallback import patch_embed as fallback

from ..support.patch_embedding import LAYOUTS, check_gradients, check_tokens, convolution, make_inputs

operator = torch.ops.beit_fast.patch_embed.default

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def fallback_patch_embed(*args, **kwargs):
    return fallback.patch_embed(PatchEmbedArguments(*args, **kwargs))


IMPLEMENTATIONS = {"operator": beit_fast.patch_embed, "fallback": fallback_patch_embed}


def with_leaves(arguments):
    """Return the arguments and the tensors that require gradients."""
    arguments = {
        name: x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    return arguments, [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]


def assert_right(arguments, implementation=beit_fast.patch_embed):
    check_tokens(implementation(**arguments), arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_embed_beit_patches_match_convolution(dtype, pixel_dtype, implementation):
    arguments = make_inputs((64, 48), (16, 16), embed=96, dtype=dtype, pixel_dtype=pixel_dtype or dtype)
    assert_right(arguments, IMPLEMENTATIONS[implementation])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_patch_embed_pixel_layouts_match_convolution(layout, pixel_dtype):
    assert_right(make_inputs((35, 50), (16, 16), embed=40, pixel_dtype=pixel_dtype, layout=layout))
    assert_right(make_inputs((35, 50), (7, 4), embed=40, pixel_dtype=pixel_dtype, layout=layout))


@st.composite
def drawn_inputs(draw):
    patch = draw(st.tuples(st.integers(1, 17), st.integers(1, 17)))
    image = tuple(side * draw(st.integers(1, 4)) + draw(st.integers(0, side - 1)) for side in patch)
    pixel_dtype = draw(st.sampled_from([torch.uint8, *DTYPES]))
    absent = set(draw(st.sets(st.sampled_from(["bias", "cls", "mask", "pos", "mean", "std"]))))
    if "mask" in absent:
        absent.add("mask_token")
    if pixel_dtype == torch.uint8:
        absent -= {"mean", "std"}
    return make_inputs(
        image,
        patch,
        batch=draw(st.integers(1, 3)),
        channels=draw(st.integers(1, 4)),
        embed=draw(st.integers(8, 70)),  # a single number may cancel to 0, where the relative error is undefined
        pixel_dtype=pixel_dtype,
        dtype=draw(st.sampled_from(DTYPES)),
        token_dtype=draw(st.sampled_from([None, *DTYPES])),
        layout=draw(st.sampled_from(LAYOUTS)),
        absent=tuple(absent),
        seed=draw(st.integers(0, 2**31)),
    )


@given(drawn_inputs())
@settings(max_examples=150, deadline=None)
def test_patch_embed_drawn_inputs_match_convolution(arguments):
    assert_right(arguments)


@given(drawn_inputs())
@settings(max_examples=30, deadline=None)
def test_fallback_drawn_inputs_match_convolution(arguments):
    assert_right(arguments, fallback_patch_embed)


@pytest.mark.parametrize("embed", [1, 15, 16, 17, 31, 32, 33, 64])
def test_patch_embed_output_channels_match_convolution(embed):
    for dtype in DTYPES:
        assert_right(make_inputs((12, 20), (4, 5), embed=embed, dtype=dtype, pixel_dtype=dtype))


@pytest.mark.parametrize("pixel_dtype", [torch.uint8, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("patch", "embed"), [((5, 7), 33), ((16, 16), 64), ((3, 3), 16)])
def test_patch_embed_many_patches_match_convolution(patch, embed, dtype, pixel_dtype):
    """From 257 patches, fp32 and fp16 use split bf16 if the CPU has tiles."""
    image = (13 * patch[0] + 1, 11 * patch[1])
    assert_right(make_inputs(image, patch, batch=3, embed=embed, dtype=dtype, pixel_dtype=pixel_dtype or dtype))


@pytest.mark.parametrize("depth", [255, 256, 257, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patch_embed_long_sums_match_convolution(depth, dtype):
    assert_right(make_inputs((2, depth), (1, depth), channels=1, embed=33, dtype=dtype, pixel_dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_patch_embed_gradients_match_convolution(dtype):
    check_gradients(beit_fast.patch_embed, make_inputs((9, 13), (4, 4), embed=6, dtype=dtype, pixel_dtype=dtype))


@pytest.mark.parametrize("alone", ["pixels", "weight", "bias", "cls", "mask_token", "pos"])
def test_patch_embed_single_gradient_matches_convolution(alone):
    arguments = make_inputs((9, 8), (4, 4), embed=6, dtype=torch.float64, pixel_dtype=torch.float64)
    arguments[alone].requires_grad_()
    (grad,) = torch.autograd.grad(beit_fast.patch_embed(**arguments).sum(), arguments[alone])  # a gradient of stride 0
    (expected,) = torch.autograd.grad(convolution(**arguments).sum(), arguments[alone])
    torch.testing.assert_close(grad, expected)


def test_patch_embed_mixed_dtypes_gradients_have_input_dtypes():
    arguments, leaves = with_leaves(make_inputs((8, 8), (4, 4), embed=6, dtype=torch.bfloat16))
    for name in ("bias", "cls", "pos"):
        arguments[name] = arguments[name].detach().float().requires_grad_()
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    tokens = beit_fast.patch_embed(**arguments)
    assert tokens.dtype == torch.float32
    for grad, leaf in zip(torch.autograd.grad(tokens.sum(), leaves), leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert grad.shape == leaf.shape


def test_patch_embed_gradcheck_passes():
    arguments, leaves = with_leaves(
        make_inputs((5, 6), (2, 2), batch=1, channels=1, embed=2, dtype=torch.float64, pixel_dtype=torch.float64)
    )
    names = [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    assert torch.autograd.gradcheck(
        lambda *x: beit_fast.patch_embed(**(arguments | dict(zip(names, x, strict=True)))), leaves
    )


@pytest.mark.parametrize("pixel_dtype", [torch.float32, torch.uint8], ids=str)
def test_patch_embed_opcheck_passes(pixel_dtype):
    arguments, _ = with_leaves(make_inputs((9, 13), (4, 4), embed=6, pixel_dtype=pixel_dtype))
    opcheck(operator, tuple(arguments.values()))
    arguments, _ = with_leaves(make_inputs((9, 13), (4, 4), embed=6, absent=("cls", "mask", "mask_token", "pos")))
    opcheck(operator, tuple(arguments.values()))


def test_patch_embed_autocast_returns_dtype_of_cls():
    arguments = make_inputs((9, 13), (4, 4), embed=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert beit_fast.patch_embed(**arguments).dtype == torch.float32
        assert beit_fast.patch_embed(arguments["pixels"], arguments["weight"]).dtype == torch.bfloat16


@pytest.mark.parametrize("mapped", [{"pixels"}, {"pixels", "mask"}, {"pixels", "weight", "cls"}])
def test_patch_embed_vmap_matches_loop(mapped):
    arguments = make_inputs((9, 13), (4, 4), embed=6, dtype=torch.float64, pixel_dtype=torch.float64)
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


def test_patch_embed_flops_are_those_of_matmul():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = make_inputs((9, 13), (4, 4), embed=6)
    with FlopCounterMode(display=False) as counter:
        beit_fast.patch_embed(**arguments)
    assert counter.get_total_flops() == 2 * 2 * 6 * 6 * 3 * 4 * 4


@pytest.mark.parametrize("pixel_dtype", [torch.float32, torch.uint8], ids=str)
def test_patch_embed_compiles_to_one_graph(pixel_dtype):
    arguments, leaves = with_leaves(make_inputs((32, 48), (16, 16), embed=24, pixel_dtype=pixel_dtype))

    def step(pixels):
        return beit_fast.patch_embed(**(arguments | {"pixels": pixels})).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(arguments["pixels"]), leaves)
    for grad, plain in zip(torch.autograd.grad(compiled(arguments["pixels"]), leaves), expected, strict=True):
        torch.testing.assert_close(grad, plain)


class Embedding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Conv2d(3, 10, (4, 8))
        self.cls = torch.nn.Parameter(torch.randn(1, 1, 10))

    def forward(self, pixels):
        weight, bias = self.projection.weight, self.projection.bias
        return beit_fast.patch_embed(pixels, weight, bias, self.cls, mean=[100.0] * 3, std=[50.0] * 3)


def test_patch_embed_export_dynamic_sizes_matches_eager():
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    module = Embedding()
    example = torch.randint(0, 256, (2, 3, 17, 24), dtype=torch.uint8)
    exported = torch.export.export(module, (example,), dynamic_shapes=({0: batch, 2: height, 3: width},), strict=True)
    assert any(node.target is operator for node in exported.graph.nodes)
    for shape in ((1, 3, 4, 8), (5, 3, 33, 50)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        torch.testing.assert_close(exported.module()(pixels), module(pixels))


def test_patch_embed_compiled_dynamic_sizes_match_eager():
    module = Embedding()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 17, 24), (3, 3, 20, 9), (4, 3, 8, 70)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
        torch.testing.assert_close(compiled(pixels), module(pixels))
