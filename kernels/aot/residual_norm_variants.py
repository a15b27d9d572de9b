"""Variants of the residual_norm kernels, for compile.py."""

from typing import Any, NamedTuple

from ..common import gpu
from ..residual_norm import backward, configs, forward
from .compile import CompileSpec

KERNELS = {
    "forward": forward.residual_norm_kernel,
    "backward": backward.residual_norm_backward_kernel,
    "sum_partials": backward.sum_partials_kernel,
}
ROWS = ("residual", "total", "normalized", "grad_total", "grad_normalized", "grad_residual")
BRANCHES = ("branch", "grad_branch")
VECTORS = ("scale", "weight", "bias", "grad_scale", "grad_weight", "grad_bias")
FLOATS = ("eps",)

ABSENT = {
    "sum alone": ("weight", "bias", "normalized", "mean", "rstd"),
    "norm alone": ("branch", "scale", "drop_path_scale", "total"),
    "no affine": ("weight", "bias"),
    "plain": ("scale", "drop_path_scale"),
    "gradient of the sum alone": (
        *("grad_normalized", "total", "weight", "mean", "rstd", "grad_residual"),
        *("partial_weight", "partial_bias", "grad_weight", "grad_bias"),
    ),
    "frozen": ("branch", "partial_scale", "partial_weight", "partial_bias"),
    "everything": (),
}
"""Parameters that are None, by form of a launch."""
FORMS = {
    "forward": ("everything", "no affine", "plain", "norm alone", "sum alone"),
    "backward": ("everything", "frozen", "gradient of the sum alone"),
    "sum_partials": ("everything", "gradient of the sum alone"),
}


class NormVariant(NamedTuple):
    """One way to compile one kernel."""

    kernel: str
    capability: int
    size: int = 768
    dtype: str = "bf16"  # of the branch and its gradient
    row_dtype: str = "bf16"  # of other rows: "fp32" under autocast
    vector_dtype: str = "bf16"  # of parameters
    form: str = "everything"
    aligned: bool = True  # whether 16 divides the strides of rows

    @property
    def tile(self) -> None:
        """None: there is no loop of matrix products."""
        return None

    @property
    def architecture(self) -> str:
        return gpu.architecture_class(*divmod(self.capability, 10))

    def compile_spec(self) -> CompileSpec:
        constants = self._constants()
        return CompileSpec(
            KERNELS[self.kernel], constants, self._specialization(constants), {"num_warps": self._warps()}
        )

    def _warps(self) -> int:
        if self.kernel == "sum_partials":
            return configs.PARTIALS_WARPS
        return configs.forward_warps(self.size) if self.kernel == "forward" else configs.backward_warps(self.size)

    def _constants(self) -> dict[str, Any]:
        """Return the compile-time arguments as the launcher passes them; absent tensors are None."""
        constants: dict[str, Any] = {
            "SIZE": self.size,
            "BLOCK": configs.padded_size(self.size),
            "ROWS": configs.BACKWARD_ROWS,
            "BLOCK_P": configs.PARTIALS_BLOCK,
            "BLOCK_C": configs.COLUMNS_BLOCK,
            **dict.fromkeys(ABSENT[self.form]),
        }
        return {name: value for name, value in constants.items() if name in KERNELS[self.kernel].arg_names}

    def _specialization(self, constants: dict[str, Any]) -> tuple[dict, dict, dict]:
        """Return signature, constants and attributes of a launch; 16 divides pointers."""
        signature: dict[str, Any] = {}
        constexprs: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        divisible = [["tt.divisibility", 16]]
        for position, name in enumerate(KERNELS[self.kernel].arg_names):
            if name in constants:
                signature[name] = "constexpr"
                constexprs[(position,)] = constants[name]
            elif name.endswith("_strides"):
                signature[name] = ("i32", "i32")
                if self.aligned:
                    attributes.update({(position, axis): divisible for axis in (0, 1)})
            elif name in FLOATS or name in forward.RUNTIME_INTEGERS:
                signature[name] = "fp32" if name in FLOATS else "i32"
            else:
                signature[name] = f"*{self._element(name)}"
                attributes[(position,)] = divisible
        return signature, constexprs, attributes

    def _element(self, name: str) -> str:
        if name in BRANCHES:
            return self.dtype
        if name in ROWS:
            return self.row_dtype
        if name in VECTORS:
            return self.vector_dtype
        assert name in ("drop_path_scale", "mean", "rstd") or name.startswith("partial_"), (
            f"the type of argument {name!r} is not known"
        )
        return "fp32"

    def __str__(self) -> str:
        dtypes = "/".join(dict.fromkeys((self.dtype, self.row_dtype, self.vector_dtype)))
        words = [f"residual_norm {self.kernel}", f"sm_{self.capability}", dtypes, f"E={self.size}", self.form]
        return " ".join(words if self.aligned else [*words, "unaligned"])


def shipped(capability: int, size: int = 768) -> list[NormVariant]:
    """Return the variants that training launches."""
    # bf16, fp32 and autocast, and in bf16 the forms with absent tensors.
    everywhere = (("bf16", "bf16", "bf16"), ("fp32", "fp32", "fp32"), ("bf16", "fp32", "fp32"))
    return [
        NormVariant(kernel, capability, size, *dtypes, form)
        for kernel, forms in FORMS.items()
        for form in forms
        for dtypes in (everywhere if form == "everything" else everywhere[:1])
    ]
