"""Variants of the attention kernels, for compile.py."""

from typing import Any, NamedTuple

import triton

from ..attention import (
    backward_dbias,
    backward_dkv,
    backward_dq,
    backward_preprocess,
    configs,
    forward,
    pack_bias,
    primitives,
)
from ..common import gpu
from ..common.compiler_hazards import is_pipelined, needs_copy_fence
from . import sass
from .compile import DTYPES, CompileSpec

KERNELS = {
    "forward": forward.attention_forward_kernel,
    "backward_dkv": backward_dkv.backward_dkv_kernel,
    "backward_dq": backward_dq.backward_dq_kernel,
    "backward_dbias": backward_dbias.backward_dbias_kernel,
    "pack_bias": pack_bias.pack_bias_kernel,
    "combine_splits": forward.combine_splits_kernel,
    "backward_preprocess": backward_preprocess.backward_preprocess_kernel,
    "dbias_cls_column": backward_dbias.dbias_cls_column_kernel,
    "dtable_patches": backward_dbias.dtable_patches_kernel,
    "dtable_cls": backward_dbias.dtable_cls_kernel,
}
PRODUCTS = {"forward": 2, "backward_dkv": 4, "backward_dq": 3, "backward_dbias": 2}
"""Matrix products per step, each of BLOCK_M x BLOCK_N x BLOCK_D multiply-adds."""

ROWS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
POINTERS = {
    "packed_bias": "*fp32",
    "cls_column": "*fp32",
    "column_offsets": "*i32",
    "grad_table": "*fp32",
    "key_mask": "*i1",
    "lse": "*fp32",
    "partial_lse": "*fp32",
    "partial_out": "*fp32",
    "delta": "*fp32",
    "lse_log2": "*fp32",
    "scratch": "*fp32",
    "table": "*fp32",
}
FLOATS = ("scale", "scale_log2", "drop_scale", "inverse_scale")
LAUNCH_DEFAULTS = {"num_warps": 4, "num_stages": 3}
"""Triton's defaults, for kernels without a table of tiles."""


class Variant(NamedTuple):
    """One way to compile one attention kernel."""

    kernel: str
    capability: int
    tile: configs.TileConfig | None = None  # None for kernels without a table of tiles
    dtype: str = "bf16"
    precision: str = "ieee"  # of fp32 products
    head_dim: int = 64
    bias_layout: configs.BiasLayout = configs.NO_BIAS
    key_mask: bool = False
    dropout: bool = False
    split: bool = False  # forward only

    @property
    def arithmetic(self) -> str:
        return gpu.arithmetic(DTYPES[self.dtype], self.precision)

    @property
    def architecture(self) -> str:
        return gpu.architecture_class(*divmod(self.capability, 10))

    def compile_spec(self) -> CompileSpec:
        constants = _constants(self)
        return CompileSpec(KERNELS[self.kernel], constants, _specialization(self, constants), _options(self))

    def __str__(self) -> str:
        words = [self.kernel, f"sm_{self.capability}", self.dtype, f"D={self.head_dim}", layout_name(self.bias_layout)]
        words += [self.precision] if self.dtype == "fp32" else []
        words += [name for name in ("key_mask", "dropout", "split") if getattr(self, name)]
        return " ".join(words + ([tile_name(self.tile)] if self.tile else []))


def tile_name(tile: configs.TileConfig) -> str:
    return f"{tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s"


def layout_name(layout: configs.BiasLayout) -> str:
    """Return the name of a layout; pairs of a plain one have their own."""
    return "plain pairs" if layout == configs.BiasLayout("plain", 2) else layout.name


def bias_layouts(capability: int, dtype: str) -> list[configs.BiasLayout]:
    """Return the bias layouts that a GPU uses."""
    # Windows of even and of odd width, and one that is too large for both layouts.
    architecture = gpu.architecture_class(*divmod(capability, 10))
    windows = ((14, 14), (15, 15), (96, 96))
    return [configs.bias_layout(architecture, DTYPES[dtype], window) for window in windows]


def shipped(variant: Variant) -> Variant:
    """Return the variant with the tiles that the launcher chooses."""
    block_d = configs.padded_head_dim(variant.head_dim)
    tile = configs.select(variant.kernel, variant.architecture, block_d, variant.arithmetic, variant.dropout)
    if not is_pipelined(variant.kernel, variant.capability, triton.__version__):
        tile = tile._replace(num_stages=1)
    return variant._replace(tile=tile)


def small_kernels(capability: int, dtype: str = "bf16", head_dim: int = 64) -> list[Variant]:
    """Return the launched forms of the kernels without a table of tiles."""
    plain = Variant("pack_bias", capability, dtype=dtype, head_dim=head_dim)
    layouts = {layout.name: layout for layout in bias_layouts(capability, dtype)}
    variants = [plain._replace(bias_layout=layout) for layout in layouts.values()]
    any_layout = variants[0].bias_layout
    variants += [plain._replace(kernel=name) for name in ("combine_splits", "backward_preprocess")]
    variants += [
        plain._replace(kernel="dbias_cls_column", bias_layout=any_layout, key_mask=masked, dropout=masked)
        for masked in (False, True)
    ]
    return variants + [plain._replace(kernel=name) for name in ("dtable_patches", "dtable_cls")]


def _options(variant: Variant) -> dict[str, int]:
    tile = variant.tile
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages} if tile else LAUNCH_DEFAULTS


def _constants(variant: Variant) -> dict[str, Any]:
    """Return the compile-time arguments as the launcher passes them; absent tensors are None."""
    blocks = {
        "pack_bias": {"BLOCK": configs.PACK_BLOCK},
        "combine_splits": {"BLOCK_M": configs.COMBINE_BLOCK},
        "backward_preprocess": {"BLOCK_M": configs.PREPROCESS_BLOCK},
        "dbias_cls_column": {"BLOCK_M": configs.PREPROCESS_BLOCK},
        "dtable_patches": {
            "BLOCK_P": configs.DIAGONAL_BLOCK_PATCHES,
            "BLOCK_V": configs.DIAGONAL_BLOCK_DIFFERENCES,
        },
        "dtable_cls": {"BLOCK": configs.CLS_BLOCK},
    }
    constants: dict[str, Any] = {
        "HEAD_DIM": variant.head_dim,
        "BLOCK_D": configs.padded_head_dim(variant.head_dim),
        "BIAS_LAYOUT": variant.bias_layout.name,
        "BIAS_VECTOR": variant.bias_layout.vector,
        "SPLIT": variant.split,
        "DROPOUT": variant.dropout,
        "PRECISION": variant.precision,
        "UPCAST": False,
        "FENCE": needs_copy_fence(variant.capability, triton.__version__),
        **blocks.get(variant.kernel, {}),
    }
    if variant.tile:
        constants.update(BLOCK_M=variant.tile.block_m, BLOCK_N=variant.tile.block_n)
    absent = {
        "packed_bias": variant.bias_layout.name == "none",
        "column_offsets": variant.bias_layout.name != "extended",
        "key_mask": not variant.key_mask,
    }
    constants.update({name: None for name, is_absent in absent.items() if is_absent})
    return {name: value for name, value in constants.items() if name in KERNELS[variant.kernel].arg_names}


def _specialization(variant: Variant, constants: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Return signature, constants and attributes of a typical launch."""
    # Triton specializes on divisibility by 16, here of pointers and strides. The stride of heads is head_dim, which may
    # be an odd multiple of 8.
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for position, name in enumerate(KERNELS[variant.kernel].arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(position,)] = constants[name]
        elif name in ROWS or name in POINTERS:
            signature[name] = _pointer_type(name, variant)
            attributes[(position,)] = divisible
        elif name in ("mask_strides", "table_strides"):
            signature[name] = ("i32", "constexpr")
            constexprs[(position, 1)] = 1
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            axes = (0, 1, 2) if variant.head_dim % 16 == 0 else (0, 1)
            attributes.update({(position, axis): divisible for axis in axes})
        elif name in FLOATS or name in primitives.RUNTIME_INTEGERS:
            signature[name] = "fp32" if name in FLOATS else "i32"
        else:
            raise ValueError(f"{variant.kernel}: the type of argument {name!r} is not known")
    return signature, constexprs, attributes


def _pointer_type(name: str, variant: Variant) -> str:
    if name == "out" and variant.split:
        return "*fp32"
    return POINTERS.get(name, f"*{variant.dtype}")


def work(variant: Variant) -> sass.Work:
    """Return the work of an iteration of a variant's main loop."""
    tile = variant.tile
    assert tile is not None, f"{variant.kernel} has no main loop"
    scores = tile.block_m * tile.block_n
    products = PRODUCTS[variant.kernel] * scores * configs.padded_head_dim(variant.head_dim)
    return sass.Work(variant.capability, tile.num_warps, scores, products, variant.arithmetic == "tf32")


def shared_memory_limit(variant: Variant) -> int:
    return gpu.SHARED_MEMORY_LIMIT[variant.architecture]
