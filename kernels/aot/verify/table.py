"""The table of cases: every shipped tile with every bias layout and dtype, for every compute capability."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

from ...attention import configs
from ...common.compiler_hazards import compiler_hazards
from ...linear_gelu import configs as linear_configs
from .. import residual_norm_variants
from ..attention_variants import layout_name
from ..compile import CAPABILITIES
from .cases import DTYPES, AttentionCase, Case, LinearCase, NormCase, PatchCase, architecture_of, arithmetic_of
from .loops import attention_tile, loops, steps_to_count

HEAD_DIMS = {16: (16, 8), 32: (32, 24), 64: (64, 40), 128: (128, 80, 96, 72)}
"""Head dimensions by what they are padded to."""
SIZES = (40, 192, 197, 384, 768, 1000, 1536, 3072)
"""Rows of residual_norm: the models', a small one, and two that 16 does not divide. Rows of 197 are not aligned."""
EVEN, ODD, LARGE = (14, 14), (15, 15), (96, 96)
"""Windows that are read in the three layouts of a bias."""
WIDE = (4, 201)
"""A window whose packed bias is too large for other layouts than "extended", with few patches."""


def table(capability: int) -> list[Case]:
    """Return the distinct cases of a compute capability. They are in the order in which they run."""
    # All dtypes and layouts of one head dimension come first: an interrupted run has seen something of everything.
    cases: list[Case] = [*_linear_cases(capability), *_norm_cases(capability)]
    cases[0:0] = quick_cases(capability)
    for block_d, dropout in itertools.product((64, 32, 128, 16), (False, True)):
        cases += _attention_cases(capability, block_d, dropout)
    cases += _combined_cases(capability)
    cases.append(AttentionCase(capability, "bf16", 32, "extended", WIDE, batch=steps_to_count(capability)))
    return list(dict.fromkeys(cases))


def is_refused(case: Case, triton_version: str) -> bool:
    """Return whether this release of Triton is refused for the case: its results are recorded and nothing else."""
    # Kernels without a matrix product are compiled correctly everywhere; Triton does not compile patch embedding.
    return not isinstance(case, NormCase | PatchCase) and bool(compiler_hazards(case.capability, triton_version))


def cases_of(capability: int, triton_version: str) -> list[Case]:
    """Return the cases to run with a release of Triton: of a refused pair, the quick ones alone."""
    quick = quick_cases(capability)
    return [case for case in table(capability) if case in quick or not is_refused(case, triton_version)]


def full_table() -> list[Case]:
    return [case for capability in CAPABILITIES for case in table(capability)]


def quick_cases(capability: int) -> list[Case]:
    """Return one case of every kernel and bias layout."""
    cases: list[Case] = []
    *biased, unbiased = layouts(capability, "bf16")
    # Small head dimensions have small tiles and windows, except for the last one.
    for number, layout in enumerate(biased):
        dtype, head_dim = ("fp16", 24) if number == 1 else ("bf16", 32)
        cases.append(attention_case(capability, dtype, head_dim, layout, key_mask=number == 1, dropout=number == 2))
    cases.append(attention_case(capability, "bf16", 64, unbiased))
    cases.append(attention_case(capability, "tf32", 40, layouts(capability, "tf32")[0]))
    cases.append(attention_case(capability, "fp32", 16, layouts(capability, "fp32")[-1], split=True, backward=False))
    cases.append(_linear_case(capability, "bf16", linear_configs.FEW, whole_steps=False))
    cases.append(NormCase(capability, "bf16", "bf16", 768))
    return cases


def layouts(capability: int, dtype: str) -> list[str]:
    """Return the names of the bias layouts of a GPU. The last one is without a bias."""
    return [*_windows(capability, dtype), "none"]


def _windows(capability: int, dtype: str) -> dict[str, tuple[int, int]]:
    """Map each layout's name to a window that is read in it."""
    size = DTYPES[dtype].itemsize
    architecture = architecture_of(capability)
    named = {layout_name(configs.bias_layout(architecture, size, window)): window for window in (LARGE, ODD, EVEN)}
    return dict(reversed(named.items()))


def _attention_cases(capability: int, block_d: int, dropout: bool) -> Iterator[AttentionCase]:
    """Yield every dtype and layout of one padded head dimension's tiles.

    GPUs that share their tiles also share the layouts with dropout: each has some of them.
    """
    sizes = HEAD_DIMS[block_d]
    sharing = [other for other in CAPABILITIES if architecture_of(other) == architecture_of(capability)]
    for row, dtype in enumerate(DTYPES):
        for column, layout in enumerate(layouts(capability, dtype)):
            if dropout and (row + column) % len(sharing) != sharing.index(capability):
                continue
            # Masks and odd sizes alternate, so that each tile and each layout meets both.
            head_dim = sizes[(row + column + dropout) % len(sizes)]
            key_mask = (row + column // 2 + dropout) % 2 == 1
            yield attention_case(capability, dtype, head_dim, layout, key_mask=key_mask, dropout=dropout)
        if dropout and row != block_d.bit_length() % len(DTYPES):
            continue
        layout = layouts(capability, dtype)[(row + dropout) % len(layouts(capability, dtype))]
        head_dim = sizes[row % len(sizes)]
        key_mask = (row + block_d // 32) % 2 == 1
        yield attention_case(
            capability, dtype, head_dim, layout, key_mask=key_mask, dropout=dropout, split=True, backward=False
        )
        if not dropout and block_d in (16, 64):
            layout = layouts(capability, dtype)[row % (len(layouts(capability, dtype)) - 1)]
            yield attention_case(capability, dtype, head_dim, layout, split=True)


def _combined_cases(capability: int) -> Iterator[AttentionCase]:
    """Yield cases in which options meet that are apart in all others."""
    # A split batch in the backward, and gradients that are computed alone.
    paired, plain, *_ = layouts(capability, "bf16")
    yield attention_case(capability, "bf16", 24, plain, key_mask=True, split=True)
    yield attention_case(capability, "fp16", 72, paired, dropout=True, split=True)
    for head_dim, gradient in ((64, "dk"), (32, "dv")):
        yield attention_case(capability, "bf16", head_dim, paired)._replace(gradients=gradient, heads=2)


@functools.cache
def attention_case(
    capability: int,
    dtype: str,
    head_dim: int,
    layout: str,
    key_mask: bool = False,
    dropout: bool = False,
    split: bool = False,
    backward: bool = True,
) -> AttentionCase:
    """Return a case with the smallest window with which every kernel counts."""
    # The last sample of a mask attends to nothing; dropout's reference is slow.
    samples = steps_to_count(capability)
    batch = 2 * samples if split and backward else samples + 1 if key_mask and backward else samples
    heads = 2 if arithmetic_of(dtype) != "half" and not (dropout or split or key_mask) else 1
    for window in _candidates():
        is_even = window[1] % 2 == 0
        if layout in ("paired", "plain pairs") and not is_even:
            continue
        if layout == "plain" and is_even:
            continue
        case = AttentionCase(
            capability, dtype, head_dim, layout, window, key_mask, dropout, split, backward, batch, heads
        )
        if all(loop.counts for loop in loops(case)) and _has_long_tail(case):
            return case
    raise ValueError(f"no window is large enough for {dtype}, D={head_dim}, {layout}, sm_{capability}")


def _has_long_tail(case: AttentionCase) -> bool:
    """Return whether the tail is long and requested splits are used. In a long tail, warps meet in memory."""
    step = attention_tile(case, "forward").block_n
    if case.split:
        combines = any(loop.kernel == "combine_splits" for loop in loops(case))
        plans = [loop.whole_steps < case.batch for loop in loops(case) if loop.kernel == "backward_dbias"]
        return all(plans) if case.backward else combines
    return case.patch_count % step >= step // 2


@functools.cache
def _candidates() -> list[tuple[int, int]]:
    """Return nearly square windows, without square ones, by number of patches."""
    windows = [(height, width) for height in range(4, 40) for width in range(4, 40) if 0 < abs(height - width) <= 4]
    return sorted(windows, key=lambda window: (window[0] * window[1], window))


def _linear_cases(capability: int) -> Iterator[LinearCase]:
    for dtype, rows in itertools.product(DTYPES, linear_configs.ROW_CLASSES):
        for whole_steps in (False, True):
            yield _linear_case(capability, dtype, rows, whole_steps)
        if rows != linear_configs.SOME:
            yield _linear_case(capability, dtype, rows, whole_steps=False, odd_outputs=True)


def _linear_case(
    capability: int, dtype: str, row_class: str, whole_steps: bool, odd_outputs: bool = False
) -> LinearCase:
    """Return a layer whose last step is whole or partial. It has partial blocks of rows and outputs."""
    rows = {linear_configs.FEW: 70, linear_configs.SOME: 650, linear_configs.MANY: 4100}[row_class]
    outputs = (80 if row_class == linear_configs.MANY else 176) - odd_outputs
    architecture = architecture_of(capability)
    tile = linear_configs.select(architecture, arithmetic_of(dtype), rows, outputs)
    steps = steps_to_count(capability)
    inputs = (steps + 1) * tile.block_k if whole_steps else steps * tile.block_k + min(16, tile.block_k // 2)
    return LinearCase(capability, dtype, rows, inputs, outputs, bias=not whole_steps)


def _norm_cases(capability: int) -> Iterator[NormCase]:
    dtypes = (("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"))
    for size, (dtype, row_dtype) in itertools.product(SIZES, dtypes):
        yield NormCase(capability, dtype, row_dtype, size)
    for form in residual_norm_variants.ABSENT:
        yield NormCase(capability, "bf16", "bf16", 768, form)
        yield NormCase(capability, "fp32", "fp32", 200, form)
    # More programs than two steps of the sum over programs.
    for dtype, row_dtype in dtypes:
        yield NormCase(capability, dtype, row_dtype, 40, batch=3, tokens=351, num_sms=66)
