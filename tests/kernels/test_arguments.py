"""Arguments of a launch: the fields of a NamedTuple equal the kernel parameters."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
from torch import Tensor

from beit_fast.kernels.attention import (
    arguments,
    backward_dbias,
    backward_dkv,
    backward_dq,
    backward_preprocess,
    forward,
    pack_bias,
)
from beit_fast.kernels.common.launch import by_name
from beit_fast.kernels.linear_gelu import kernel as linear_gelu
from beit_fast.kernels.linear_gelu.launch import LinearGeluArguments
from beit_fast.kernels.residual_norm import backward as norm_backward
from beit_fast.kernels.residual_norm import forward as norm_forward
from beit_fast.kernels.residual_norm import launch as norm

from ..support.checkout import ROOT

KERNELS = [
    (arguments.PackBiasArguments, pack_bias.pack_bias_kernel),
    (arguments.ForwardArguments, forward.attention_forward_kernel),
    (arguments.CombineSplitsArguments, forward.combine_splits_kernel),
    (arguments.BackwardPreprocessArguments, backward_preprocess.backward_preprocess_kernel),
    (arguments.BackwardDkvArguments, backward_dkv.backward_dkv_kernel),
    (arguments.BackwardDqArguments, backward_dq.backward_dq_kernel),
    (arguments.BackwardDbiasArguments, backward_dbias.backward_dbias_kernel),
    (arguments.DbiasClsColumnArguments, backward_dbias.dbias_cls_column_kernel),
    (arguments.DtablePatchesArguments, backward_dbias.dtable_patches_kernel),
    (arguments.DtableClsArguments, backward_dbias.dtable_cls_kernel),
    (LinearGeluArguments, linear_gelu.linear_gelu_kernel),
    (norm.ForwardArguments, norm_forward.residual_norm_kernel),
    (norm.BackwardArguments, norm_backward.residual_norm_backward_kernel),
    (norm.SumPartialsArguments, norm_backward.sum_partials_kernel),
]
each_kernel = pytest.mark.parametrize(("fields_of", "kernel"), KERNELS, ids=[pair[0].__name__ for pair in KERNELS])


def parameters(fields_of: type) -> Iterator[str]:
    """Yield the field names of a NamedTuple, with those of nested ones."""
    for name, kind in get_type_hints(fields_of, localns={"Tensor": Tensor}).items():
        if hasattr(kind, "_fields"):
            yield from parameters(kind)
        else:
            yield name


@each_kernel
def test_arguments_fields_equal_kernel_parameters(fields_of: type, kernel: Any) -> None:
    assert Counter(parameters(fields_of)) == Counter(kernel.arg_names)


@each_kernel
def test_arguments_misspelt_field_raises(fields_of: Any, kernel: Any) -> None:
    *names, last = fields_of._fields
    values = dict.fromkeys(names)
    assert fields_of(**values, **{last: 1})[-1] == 1
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{last}_'"):
        fields_of(**values, **{f"{last}_": 1})


def test_arguments_cover_every_kernel() -> None:
    modules = (pack_bias, forward, backward_preprocess, backward_dkv, backward_dq, backward_dbias)
    modules += (linear_gelu, norm_forward, norm_backward)
    found = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert found == {kernel.__name__ for _, kernel in KERNELS}


def test_by_name_flattens_nested_arguments() -> None:
    matmul = arguments.MatmulArguments(PRECISION="tf32", UPCAST=False, FENCE=True)
    tile = arguments.TileArguments(64, 32)
    nested = arguments.BackwardDqArguments(None, matmul, None, tile, None, None, scale=0.5)
    named = by_name(nested)
    assert {name: value for name, value in named.items() if value is not None} == {
        "PRECISION": "tf32",
        "UPCAST": False,
        "FENCE": True,
        "BLOCK_M": 64,
        "BLOCK_N": 32,
        "scale": 0.5,
    }


def test_mypy_relaxes_only_kernel_files() -> None:
    """Type-check launches and their arguments.

    A misspelt field is then an error without a GPU.
    """
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    (relaxed,) = [entry["module"] for entry in overrides if entry.get("check_untyped_defs") is False]
    compiled = {
        f"beit_fast.kernels.{file.parent.name}.{file.stem}"
        for file in (ROOT / "kernels").glob("*/*.py")
        if "@triton.jit" in file.read_text()
    }
    assert set(relaxed) == compiled
