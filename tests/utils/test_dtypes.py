"""Names of dtypes: one list for configurations, loading, optimized models and the commands."""

import pytest
import torch

from beit_fast import BeitConfig, BeitModel
from beit_fast.utils.dtypes import find_dtype
from beit_fast.utils.names import DTYPE_ALIASES

from ..support.transformers_reference import TINY

NAMES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
    "float": torch.float32,
    "fp64": torch.float64,
    "double": torch.float64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    BeitModel(BeitConfig(**TINY)).save_pretrained(path)
    return path


def test_aliases_are_those_that_are_tested():
    assert set(NAMES) == set(DTYPE_ALIASES)


@pytest.mark.parametrize("name", [*NAMES, "bfloat16", "torch.bfloat16"])
def test_every_name_of_a_dtype_means_that_dtype_everywhere(name, folder):
    """Regression: configurations and `from_pretrained` rejected names that the commands accepted."""
    dtype = NAMES.get(name, torch.bfloat16)
    assert find_dtype(name) is dtype
    config = BeitConfig(dtype=name)
    assert config.dtype is dtype
    assert config == BeitConfig(dtype=dtype)
    assert config.to_dict()["dtype"] == str(dtype).removeprefix("torch.")
    assert BeitConfig(torch_dtype=name).dtype is dtype
    assert BeitConfig(dtype=name, torch_dtype=dtype).dtype is dtype
    assert BeitModel._from_config(BeitConfig(**TINY), dtype=name).dtype is dtype
    for options in ({"dtype": name}, {"torch_dtype": name}, {"dtype": name, "torch_dtype": dtype}):
        assert BeitModel.from_pretrained(folder, **options).dtype is dtype


@pytest.mark.parametrize("name", ["bf61", "torch", "nn", "", "int8", "fp8"])
def test_a_name_that_is_not_of_a_floating_point_dtype_is_an_error(name, folder):
    expected = f"dtype={name!r} is not supported .expected None, a floating-point torch.dtype or its name such as"
    if name == "int8":
        expected = "dtype=torch.int8 is not supported"
    with pytest.raises(ValueError, match=expected):
        BeitConfig(dtype=name)
    with pytest.raises(ValueError, match=expected):
        BeitModel.from_pretrained(folder, dtype=name)
