"""`beit-fast` and `python -m beit_fast`, as a user runs them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_fast import __version__, native
from beit_fast.cli import info, main
from beit_fast.cli.options import PredictOptions
from beit_fast.ops.dispatch import attention, availability
from beit_fast.utils.names import DTYPE_ALIASES

HALF_AND_SINGLE = [item for item in DTYPE_ALIASES.items() if item[1] != "float64"]


def test_info_as_a_process_prints_aligned_text_and_nothing_else() -> None:
    command = [sys.executable, "-m", "beit_fast", "info"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"beit_fast {__version__}")
    for section in ("versions", "devices", "kernels behind patch embedding", "native libraries"):
        assert section in lines
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines)
    first = next(place for place, line in enumerate(lines) if line.startswith("kernels behind attn_implementation")) + 1
    kernels = [line for line in lines[first : first + len(availability.KERNELS)] if "no: " in line]
    assert len({line.index("no: ") for line in kernels}) == 1


def test_info_json_agrees_with_the_dispatcher_and_the_native_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["environment"]["torch"] == torch.__version__
    assert facts["devices"][0]["name"] == "cpu"
    described = {kernel["kernel"]: kernel for kernel in facts["kernels"]}
    for kernel, available, reasons in attention.describe_kernels():
        assert described[kernel]["available"] is available
        assert described[kernel]["unsupported_reasons"] == list(reasons)
        assert available is not bool(reasons)
    assert facts["native_libraries"] == {name: native.describe(name) for name in native.LIBRARIES}
    assert [row["kernel"] for row in facts["patch_embed_kernels"]] == list(availability.PATCH_EMBED_KERNELS)
    used, usable = native.instruction_sets()
    assert facts["instruction_sets"] == {"used": used, "usable": list(usable)}


def test_info_on_gpu_with_faulty_compiler_names_the_torch_that_is_sound(
    fake_gpu: Callable[[tuple[int, int], str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_gpu((10, 0), "3.7.1")
    assert main.main(["info"]) == 0
    assert (
        "no: Triton 3.7.1 compiles for compute capability 10.0 with a known fault: warps race in tensor memory; "
        "use torch 2.14 or later, which brings Triton 3.8.0"
    ) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--json", "required: COMMAND"),
        ("fly", "'fly' (choose from"),
        ("info --yaml", "--yaml"),
        ("classify --model m", "required: IMAGE"),
        ("classify a.png --model m --top 0", "0 is not a positive number"),
        ("classify a.png --model m --top abc", "argument --top: 'abc' is not a whole number"),
        ("classify a.png --model m --json --csv", "--csv: not allowed with argument --json"),
        ("classify a.png --model m --attn flash", "'flash' (choose from"),
        ("segment a.png --model m", "required: --out"),
        ("segment a.png --out b.png --model m --opacity 2", "2 is not between 0 and 1"),
        ("segment a.png --out b.png --model m --opacity half", "argument --opacity: 'half' is not a number"),
        ("convert a b --image-size big", "argument --image-size: big is not a number or HEIGHTxWIDTH"),
        ("convert a b --image-size 1x2x3", "1x2x3 is not a number or HEIGHTxWIDTH"),
        ("predict a b --model m --top 0", "0 is not a positive number"),
        ("predict a b --model m --logits --features", "not allowed with argument"),
        ("predict a b --model m --top 1 --features", "not allowed with argument"),
        ("predict a b --model m --overwrite --retry-failed", "not allowed with argument"),
        ("predict a b --model m --workers -1", "-1 is negative"),
        ("predict a --model m", "required: OUT"),
        ("predict a b c --model m", "unrecognized arguments: c"),
    ],
)
def test_main_wrong_arguments_exit_with_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(line.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_main_without_arguments_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    out, err = capsys.readouterr()
    assert "usage: beit-fast" in out
    assert all(command in out for command in main._COMMANDS)
    assert err == ""


@pytest.mark.parametrize(("short", "name"), [*HALF_AND_SINGLE, ("torch.float16", "float16")])
def test_main_short_names_of_dtypes_are_accepted(short: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr("beit_fast.cli.predict.command.predict", lambda options: found.append(options.dtype) or 0)
    monkeypatch.setattr("beit_fast.cli.commands.convert", lambda options: found.append(options.dtype) or 0)
    monkeypatch.setattr("beit_fast.cli.tune.tune", lambda options: found.append(*options.dtype) or 0)
    for line in ("predict a b --model m", "convert a b", "tune"):
        assert main.main([*line.split(), "--dtype", short]) == 0
    assert found == [name] * 3


def test_main_fills_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """With defaults and with every kind of value."""
    found: list[PredictOptions] = []
    monkeypatch.setattr("beit_fast.cli.predict.command.predict", lambda options: found.append(options) or 0)
    assert main.main(["predict", "images", "out.jsonl", "--model", "m"]) == 0
    line = "predict a b.pq --model m --features --retry-failed --workers 0 --dtype bfloat16"
    assert main.main(line.split()) == 0
    defaults = PredictOptions(
        **{"model": "m", "processor": None, "attn": None, "device": None, "dtype": None},
        **{"local_files_only": False, "json": False},
        **{"dataset": "images", "out": Path("out.jsonl"), "format": None, "output": "classes", "top": 5},
        **{"batch_size": 32, "workers": None, "optimize": False, "start": "resume"},
    )
    changes = {"output": "features", "start": "retry-failed", "workers": 0, "dtype": "bfloat16"}
    assert found == [defaults, replace(defaults, dataset="a", out=Path("b.pq"), **changes)]


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        (
            {"reason": "_C.1.so was not built: no compiler", "file": None, "built_for": None, "loaded": False},
            "operators on the CPU: _C.1.so was not built: no compiler",
        ),
        (
            {"reason": None, "file": "_C.1.so", "built_for": "portable, avx2", "loaded": True},
            "operators on the CPU: _C.1.so, built for portable, avx2 (loaded)",
        ),
        (
            {"reason": None, "file": "_C.1.so", "built_for": None, "loaded": False},
            "operators on the CPU: _C.1.so (loaded at the first call)",
        ),
    ],
)
def test_format_facts_describes_a_library_in_one_line(library: dict[str, Any], expected: str) -> None:
    facts = info.gather_facts()
    facts["native_libraries"] = {"_C": {"serves": "operators on the CPU"} | library}
    assert f"  _C  {expected}" in info.format_facts(facts).splitlines()


def test_main_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"beit_fast {__version__}\n")


@pytest.mark.parametrize("command", main._COMMANDS)
def test_help_describes_the_command_and_every_option(command: str) -> None:
    """An option's help is a phrase of its own: no fragment that starts with "of", no single word."""
    parser = main._parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    described = commands.choices[command]
    assert described.description is not None
    assert described.description.endswith(".")
    for action in described._actions:
        if action.help == argparse.SUPPRESS:
            continue  # another spelling, of unilm
        assert action.help is not None, action.option_strings
        assert len(action.help.split()) > 1, action.option_strings
        assert not action.help.startswith("of "), action.option_strings
