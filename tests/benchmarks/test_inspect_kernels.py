"""The script benchmarks/inspect_kernels.py: variants, tables and errors."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="there is nothing to compile without Triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton's interpreter and its compiler cannot share a process", allow_module_level=True)

from beit_fast.kernels.aot import attention_variants, compile
from beit_fast.kernels.aot.compile import CAPABILITIES
from beit_fast.kernels.attention import configs

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "inspect_kernels.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("beit_fast_inspect_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_main_prints_and_writes_a_table_of_one_kernel(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kernels.json"
    options = ["--kernel", "forward", "--capability", "80", "--tile", "64,64,4,2", "--json", str(file)]
    assert script.main(options) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["kernel", "sm", "tile", "bias"]
    content = json.loads(file.read_text())
    assert content["conditions"]["dtype"] == "bf16"
    assert content["conditions"]["head_dim"] == 64
    rows = content["rows"]
    assert [row["bias"] for row in rows] == ["none", "paired", "plain", "extended"]
    assert len(lines) == len(rows)
    for row in rows:
        assert row["tile"] == [64, 64, 4, 2]
        assert row["instructions"] == sum(row["by_pipe"].values()) == row["cycles"]["issue"]
        assert row["to_none"] == row["instructions"] / rows[0]["instructions"] >= 1
        assert row["cycles"][row["bound"]] == max(row["cycles"].values())
        assert row["unknown"] == []
    assert script.main([*options, "--markdown"]) == 0  # compiled already
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) <= set("|-: ")


def test_variants_of_without_a_tile_returns_the_shipped_and_the_reference(script: ModuleType) -> None:
    options = script.parse(["--all"])
    assert options.capability == list(CAPABILITIES)
    for kernel in configs.KERNELS:
        for capability in options.capability:
            variants = script.variants_of(kernel, capability, options)
            shipped = attention_variants.shipped(attention_variants.Variant(kernel, capability)).tile
            assert {variant.tile for variant in variants} == {shipped, script.REFERENCE}
            layouts = {variant.bias_layout for variant in variants}
            assert (configs.NO_BIAS in layouts) is (kernel != "backward_dbias")
            assert layouts >= set(attention_variants.bias_layouts(capability, "bf16"))
            assert len(set(variants)) == len(variants)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tile", "64,64"], "M,N,WARPS,STAGES"),
        (["--tile", "48,64,4,2"], "powers of two"),
        (["--tile", "64,64,4,x"], "M,N,WARPS,STAGES"),
        (["--head-dim", "60"], "multiple of 8"),
        (["--head-dim", "136"], "8 to 128"),
        (["--capability", "75"], "choose from 80"),
        (["--kernel", "sideways"], "choose from"),
        (["--precision", "tf32"], "--dtype fp32"),
    ],
)
def test_parse_bad_options_exits(
    script: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_main_kernel_that_does_not_compile_returns_1(script: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    """A tile of a million scores has too many elements for Triton."""
    options = ["--kernel", "forward", "--capability", "80", "--tile", "2048,1024,4,2"]
    assert script.main(options) == 1
    assert "forward sm_80 bf16 D=64 none 2048x1024 4w 2s does not compile" in capfd.readouterr().err


def test_interpreter_exits_with_error(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        compile.primitives, "split_program_id", object()
    )  # under the interpreter it is not a JITFunction
    assert script.main(["--kernel", "forward", "--capability", "80"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("inspect_kernels.py: Triton's interpreter is on")
