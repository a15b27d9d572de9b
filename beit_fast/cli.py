"""The command `beit-fast`, and `python -m beit_fast`, which is the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NATIVE_LIBRARIES = {"_C": "operators on the CPU", "_C_cuda": "patch embedding on CUDA"}
"""The compiled libraries that can lie beside this file, and what each serves."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, 0; wrong arguments exit with 2 (argparse's SystemExit)."""
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="beit-fast", description="BEiT with its position bias inside the attention kernels."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    info = commands.add_parser("info", help="versions, devices, and which attention kernel serves each of them")
    info.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    info.set_defaults(run=_info)
    return parser


def _info(options: argparse.Namespace) -> int:
    facts = gather_facts()
    print(json.dumps(facts, indent=1) if options.json else format_facts(facts))
    return 0


def gather_facts() -> dict[str, Any]:
    """What `beit-fast info` says, for JSON: environment, devices, attention kernels, native libraries."""
    from . import attention
    from .measure import environment

    kernels = [
        {"kernel": kernel, "available": available, "reasons": list(reasons)}
        for kernel, available, reasons in attention.describe_kernels()
    ]
    return {
        "environment": environment("cpu"),
        "devices": _devices(),
        "kernels": kernels,
        "native_libraries": native_libraries(),
    }


def _devices() -> list[dict[str, str]]:
    import torch

    from .measure import cpu_name

    devices = [{"name": "cpu", "what": f"{cpu_name()}, {torch.get_num_threads()} threads"}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        what = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        devices.append({"name": f"cuda:{index}", "what": f"{what}, {properties.total_memory / 2**30:.0f} GiB"})
    return devices


def native_libraries() -> dict[str, str | None]:
    """The file of each library in `NATIVE_LIBRARIES`, or None where it was not built."""
    folder = Path(__file__).parent
    files = sorted(path.name for path in folder.glob("_C*") if path.suffix in (".so", ".pyd"))
    cuda = next((name for name in files if name.startswith("_C_cuda")), None)
    cpu = next((name for name in files if not name.startswith("_C_cuda")), None)
    return {"_C": cpu, "_C_cuda": cuda}


def format_facts(facts: dict[str, Any]) -> str:
    """`gather_facts` as aligned text."""
    environment = facts["environment"]
    versions = {name: environment[name] for name in ("python", "torch", "cuda", "triton", "transformers")}
    commit = f" (commit {environment['commit']})" if environment["commit"] else ""
    lines = [f"beit_fast {environment['beit_fast']}{commit}", "", "versions"]
    lines += _aligned([(name, version or "none") for name, version in versions.items()])
    lines += ["", "devices"]
    lines += _aligned([(device["name"], device["what"]) for device in facts["devices"]])
    lines += ["", 'kernels behind attn_implementation="triton" (float32, head dimension 64)']
    lines += _aligned([_kernel_line(kernel) for kernel in facts["kernels"]])
    lines += ["", "native libraries"]
    lines += _aligned(
        [(name, facts["native_libraries"][name] or "not built", what) for name, what in NATIVE_LIBRARIES.items()]
    )
    return "\n".join(lines)


def _kernel_line(kernel: dict[str, Any]) -> tuple[str, ...]:
    verdict = "available" if kernel["available"] else "no: " + "; ".join(kernel["reasons"])
    return kernel["kernel"], verdict


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
