"""Variants of the linear_gelu kernel, for compile.py."""

from typing import Any, NamedTuple

import triton

from ..common import gpu
from ..common.compiler_hazards import needs_copy_fence
from ..linear_gelu import configs
from ..linear_gelu.kernel import linear_gelu_kernel
from . import sass
from .compile import DTYPES, CompileSpec

POINTERS = ("x", "weight", "bias", "out")
SIZES = ("row_stride", "weight_stride", "input_count")


class LinearVariant(NamedTuple):
    """One way to compile the kernel."""

    capability: int
    tile: configs.LinearTile
    dtype: str = "bf16"
    precision: str = "ieee"  # of fp32 products
    whole_steps: bool = True
    bias: bool = True
    even_outputs: bool = True  # whether 16 divides their number, as in every BEiT

    @property
    def architecture(self) -> str:
        return gpu.architecture_class(*divmod(self.capability, 10))

    def compile_spec(self) -> CompileSpec:
        constants = self._constants()
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        return CompileSpec(linear_gelu_kernel, constants, self._specialization(constants), options)

    def _constants(self) -> dict[str, Any]:
        """Return the compile-time arguments as the launcher passes them."""
        return {
            "BLOCK_M": self.tile.block_m,
            "BLOCK_N": self.tile.block_n,
            "BLOCK_K": self.tile.block_k,
            "GROUP": configs.GROUP,
            "WHOLE_STEPS": self.whole_steps,
            "PRECISION": self.precision,
            "UPCAST": False,
            "FENCE": needs_copy_fence(self.capability, triton.__version__),
            **({} if self.bias else {"bias": None}),
        }

    def _specialization(self, constants: dict[str, Any]) -> tuple[dict, dict, dict]:
        """Return signature, constants and attributes of a launch."""
        # Triton specializes on divisibility by 16, here of pointers, strides and inputs, and on a stride of 1 of the
        # bias.
        signature: dict[str, Any] = {}
        constexprs: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        for position, name in enumerate(linear_gelu_kernel.arg_names):
            if name in constants or name == "bias_stride":
                signature[name] = "constexpr"
                constexprs[(position,)] = constants.get(name, 1)
                continue
            signature[name] = f"*{self.dtype}" if name in POINTERS else "i32"
            if name in (*POINTERS, *SIZES) or (name == "output_count" and self.even_outputs):
                attributes[(position,)] = [["tt.divisibility", 16]]
        return signature, constexprs, attributes

    def __str__(self) -> str:
        block = "x".join(map(str, self.tile[:3]))
        words = [
            "linear_gelu",
            f"sm_{self.capability}",
            self.dtype,
            *([self.precision] if self.dtype == "fp32" else []),
        ]
        flags = ("ragged steps", self.whole_steps), ("no bias", self.bias), ("odd outputs", self.even_outputs)
        words += [word for word, usual in flags if not usual]
        return " ".join([*words, block, f"{self.tile.num_warps}w", f"{self.tile.num_stages}s"])


def shipped(capability: int, dtype: str = "bf16", precision: str = "ieee") -> list[LinearVariant]:
    """Return the variants from which the launcher chooses by row count."""
    architecture = gpu.architecture_class(*divmod(capability, 10))
    multiplies = gpu.arithmetic(DTYPES[dtype], precision)
    tiles = dict.fromkeys(configs.TILES[multiplies, architecture])
    return [LinearVariant(capability, tile, dtype, precision) for tile in tiles]


def work(variant: LinearVariant) -> sass.Work:
    """Return the work of an iteration of the main loop."""
    # Its "scores" are sums of block_k products.
    tile = variant.tile
    sums = tile.block_m * tile.block_n
    return sass.Work(variant.capability, tile.num_warps, sums, sums * tile.block_k, variant.precision == "tf32")
