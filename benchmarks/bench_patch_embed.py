"""Pixels to tokens on a CPU, each baseline in its own process: `pytest benchmarks/bench_patch_embed.py`.

The timed function returns tokens `[B, 1 + P, E]`: the projection with CLS before it. For uint8 pixels it includes the
normalisation and the position embeddings.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import beit_fast
from beit_fast.ops.dispatch import availability

from .harness.cases import DTYPE_NAMES, Reference, checked_errors, chosen_device, relative_error
from .harness.processes import Prepared, Worker

BENCH = "cpu patch embedding"
FLOAT, BYTES = "float pixels", "uint8 pixels"
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of bytes
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class PatchCase:
    """One shape.

    Attributes:
        mode: `FLOAT` or `BYTES`, the kind of pixels.
        batch: Number of images.
        dtype: Of parameters, tokens and float pixels.
        image: Height and width in pixels.
        patch: Side of a patch.
        embed: Width of a token.
        channels: Channels of the pixels.
    """

    mode: str
    batch: int
    dtype: str
    image: int = 224
    patch: int = 16
    embed: int = 768
    channels: int = 3

    def __str__(self) -> str:
        return f"{self.mode.split()[0]}-{self.batch}x{self.image}-{self.dtype}"

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.patches * self.embed * self.channels * self.patch**2


@dataclass(frozen=True)
class PatchInputs:
    """pixels `[B, C, H, W]`, weight `[E, C, p, p]`, bias `[E]`, cls `[1, 1, E]`; for uint8 pos `[1, 1 + P, E]`."""

    pixels: Tensor
    weight: Tensor
    bias: Tensor
    cls: Tensor
    pos: Tensor | None


def draw(case: PatchCase) -> PatchInputs:
    """Draw the inputs of a case from a fixed seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(DTYPES[case.dtype])

    shape = (case.batch, case.channels, case.image, case.image)
    is_bytes = case.mode == BYTES
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) if is_bytes else normal(*shape)
    fan_in = case.channels * case.patch**2
    weight = normal(case.embed, case.channels, case.patch, case.patch, scale=fan_in**-0.5)
    pos = normal(1, 1 + case.patches, case.embed) if is_bytes else None
    return PatchInputs(pixels, weight, normal(case.embed), normal(1, 1, case.embed), pos)


def with_cls_and_positions(tokens: Tensor, inputs: PatchInputs) -> Tensor:
    """Prepend CLS and add positions: `[B, P, E]` to `[B, 1 + P, E]`."""
    tokens = torch.cat([inputs.cls.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if inputs.pos is None else tokens + inputs.pos


def convolution(pixels: Tensor, inputs: PatchInputs) -> Tensor:
    """Compute tokens by a convolution whose stride is its kernel size."""
    maps = F.conv2d(pixels, inputs.weight, inputs.bias, stride=inputs.weight.shape[2:])
    return with_cls_and_positions(maps.flatten(2).transpose(1, 2), inputs)


def normalised(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise uint8 pixels as an image processor does; compute in fp32 or wider, in place."""
    wide = pixels.to(torch.promote_types(dtype, torch.float32))
    mean, std = (wide.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (MEAN, STD))
    return wide.sub_(mean).div_(std).to(dtype)


def _ours(inputs: PatchInputs) -> Callable[[], Tensor]:
    mean, std = (MEAN, STD) if inputs.pixels.dtype == torch.uint8 else (None, None)
    return lambda: beit_fast.patch_embed(
        inputs.pixels, inputs.weight, inputs.bias, inputs.cls, pos=inputs.pos, mean=mean, std=std
    )


def _convolution(inputs: PatchInputs) -> Callable[[], Tensor]:
    return lambda: convolution(inputs.pixels, inputs)


def _channels_last(inputs: PatchInputs) -> Callable[[], Tensor]:
    """Convert pixels and weight before the clock starts."""
    layout = torch.channels_last
    moved = replace(
        inputs, pixels=inputs.pixels.to(memory_format=layout), weight=inputs.weight.to(memory_format=layout)
    )
    return lambda: convolution(moved.pixels, moved)


def _unfold(inputs: PatchInputs) -> Callable[[], Tensor]:
    matrix, side = inputs.weight.flatten(1), inputs.weight.shape[2]

    def run() -> Tensor:
        blocks = inputs.pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, h, p, w, p]
        patches = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, P, C * p * p]
        return with_cls_and_positions(F.linear(patches, matrix, inputs.bias), inputs)

    return run


def _normalise_and_convolve(inputs: PatchInputs) -> Callable[[], Tensor]:
    return lambda: convolution(normalised(inputs.pixels, inputs.weight.dtype), inputs)


OURS = "beit_fast fused"
BASELINES: dict[str, dict[str, Callable[[PatchInputs], Callable[[], Tensor]]]] = {
    FLOAT: {
        OURS: _ours,
        "conv": _convolution,
        "conv channels_last": _channels_last,
        "unfold + linear": _unfold,
    },
    BYTES: {OURS: _ours, "normalise + conv": _normalise_and_convolve},
}


def runs(full: bool) -> list[tuple[PatchCase, int]]:
    """List the cases with their numbers of threads: a quick set of under a minute, or all."""
    dtypes, batches, counts = (("fp32", "bf16", "fp16"), (1, 8), (1, 2)) if full else (("fp32", "bf16"), (1,), (1,))
    return [
        (PatchCase(mode, batch, dtype), threads)
        for mode, dtype, batch, threads in itertools.product(BASELINES, dtypes, batches, counts)
    ]


def run_name(case: PatchCase, threads: int) -> str:
    return f"{case}-{threads}-thread{'s' if threads > 1 else ''}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    drawn = runs(options.full) if chosen_device(options.device) == "cpu" else []
    metafunc.parametrize(("case", "threads"), drawn, ids=[run_name(*one) for one in drawn])


def test_patch_embed(case: PatchCase, threads: int, time_workers: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "reference.pt"
    torch.save(vars(reference(case)), file)
    workers = [
        Worker(baseline, prepare, {"baseline": baseline, "expected": str(file), **asdict(case)})
        for baseline in BASELINES[case.mode]
    ]
    facts = {**asdict(case), "tokens": 1 + case.patches, "flops": case.flops}
    time_workers(BENCH, run_name(case, threads), threads, workers, facts)


def reference(case: PatchCase) -> Reference:
    """Compute fp64 tokens; the budget is twice the error of the convolution in the dtype, plus four eps."""
    inputs = draw(case)
    wide = PatchInputs(*(None if x is None else x.double() for x in vars(inputs).values()))  # type: ignore[arg-type]
    is_bytes = case.mode == BYTES
    pixels = normalised(inputs.pixels, torch.float64) if is_bytes else wide.pixels
    exact = convolution(pixels, wide)
    rounded = (_normalise_and_convolve if is_bytes else _convolution)(inputs)()
    budget = 2 * relative_error(rounded, exact) + 4 * torch.finfo(DTYPES[case.dtype]).eps
    return Reference({"tokens": exact}, {"tokens": budget})


def prepare(baseline: str, expected: str, **fields: Any) -> Prepared:
    """Check a baseline against the reference and return its step.

    Args:
        baseline: Its name.
        expected: File with the reference.
        fields: Fields of the PatchCase.

    Raises:
        ValueError: If the tokens exceed their error budget.
    """
    case = PatchCase(**fields)
    inputs = draw(case)
    embed = BASELINES[case.mode][baseline](inputs)
    with torch.no_grad():
        tokens = embed()
    errors = checked_errors({"tokens": tokens}, Reference(**torch.load(expected, mmap=True)))
    kernel = (
        "torch" if baseline != OURS else availability.patch_embed_kernel(tokens.device, [tokens.dtype], case.channels)
    )

    def step() -> Tensor:
        with torch.no_grad():
            return embed()

    return Prepared(step, {"kernel": kernel, "errors": errors})
