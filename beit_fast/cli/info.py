"""Versions, devices, kernels and native libraries that `beit-fast info` prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..utils import variables
from ..utils.messages import count_of
from .options import ExitCode, InfoOptions


def info(options: InfoOptions) -> int:
    """Print versions, devices and kernels, and return the exit code."""
    facts = gather_facts()
    print(json.dumps(facts, indent=1) if options.json else format_facts(facts))
    return ExitCode.DONE


def gather_facts() -> dict[str, Any]:
    """Collect environment, devices, kernels, libraries, instruction sets and linear layers, for JSON."""
    from .. import native
    from ..ops.dispatch import attention
    from .collect_env import environment

    used, usable = native.instruction_sets()
    return {
        "environment": environment("cpu"),
        "devices": _devices(),
        "kernels": [
            {"kernel": kernel, "available": available, "unsupported_reasons": list(reasons)}
            for kernel, available, reasons in attention.describe_kernels()
        ],
        "patch_embed_kernels": _patch_embed_kernels(),
        "native_libraries": {library: native.describe(library) for library in native.LIBRARIES},
        "missing_kernels": native.missing_kernels(),
        "instruction_sets": {"used": used, "usable": list(usable)},
        "tuned_tiles": _tuned_tiles(),
        "variables": _variables(),
        "linears": _linears(),
    }


def _tuned_tiles() -> list[dict[str, Any]]:
    """Describe the tuned tiles of each GPU: their number, or why none are in use."""
    import torch

    from ..tuning import tune

    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            found = tune.describe(device)
        except (ImportError, ValueError) as error:  # no Triton, or a variable that `_variables` lists
            found = {"file": None, "tiles": [], "reason": str(error)}
        rows.append(
            {"device": str(device), "file": found["file"], "tiles": len(found["tiles"]), "reason": found["reason"]}
        )
    return rows


def _variables() -> list[dict[str, str | None]]:
    """Describe the environment variables that are set, with their errors.

    The error is the one that the first use raises.
    """
    from .. import native
    from ..ops.cpu_linear import choice

    checks: dict[str, Callable[[], object]] = {
        variables.NATIVE: lambda: native.check_variables("meta"),  # the CPU would check BEIT_FAST_CPU_ISA too
        variables.CPU_ISA: native.check_instruction_set,
        variables.CPU_LINEAR: choice.choose_gemm,
        variables.TUNED: lambda: variables.choice(variables.TUNED, ("0", "1")),
    }
    rows: list[dict[str, str | None]] = []
    for name, value in variables.values().items():
        error = None
        try:
            checks[name]()
        except ValueError as caught:
            error = str(caught)
        rows.append({"name": name, "value": value, "error": error})
    return rows


def _linears() -> dict[str, Any]:
    import torch

    from ..ops.cpu_linear import choice, onednn

    try:
        chosen = choice.choose_gemm()
        training: dict[str, str | None] = {"gemm": chosen.name, "reason": chosen.reason}
    except ValueError as error:  # what a forward would raise
        training = {"gemm": None, "reason": str(error)}
    return {"packed": {"reason": onednn.unsupported_reason("cpu", torch.float32)}, "training": training}


def _patch_embed_kernels() -> list[dict[str, Any]]:
    import torch

    from ..ops.dispatch import availability

    rows = []
    for kernel in availability.PATCH_EMBED_KERNELS:
        device = torch.device("cuda" if kernel == "cuda" else "cpu")
        reasons = availability.patch_embed_unsupported_reasons(kernel, device)
        rows.append({"kernel": kernel, "available": not reasons, "unsupported_reasons": list(reasons)})
    return rows


def _devices() -> list[dict[str, str]]:
    import torch

    from .collect_env import cpu_name

    devices = [{"name": "cpu", "what": f"{cpu_name()}, {count_of(torch.get_num_threads(), 'thread')}"}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        what = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
        devices.append({"name": f"cuda:{index}", "what": f"{what}, {properties.total_memory / 2**30:.0f} GiB"})
    return devices


def format_facts(facts: dict[str, Any]) -> str:
    """Format the result of `gather_facts` as aligned text."""
    environment = facts["environment"]
    versions = {name: environment[name] for name in ("python", "torch", "cuda", "triton", "transformers")}
    commit = f" (commit {environment['commit']})" if environment["commit"] else ""
    lines = [f"beit_fast {environment['beit_fast']}{commit}", "", "versions"]
    lines += _aligned([(name, version or "none") for name, version in versions.items()])
    lines += ["", "devices"]
    lines += _aligned([(device["name"], device["what"]) for device in facts["devices"]])
    lines += ["", 'kernels behind attn_implementation="triton" (float32, head dimension 64)']
    lines += _aligned([_kernel_line(kernel) for kernel in facts["kernels"]])
    lines += ["", "kernels behind patch embedding"]
    lines += _aligned([_kernel_line(kernel) for kernel in facts["patch_embed_kernels"]])
    lines += ["", "native libraries"]
    lines += _aligned([(name, _library_line(library)) for name, library in facts["native_libraries"].items()])
    if facts["variables"]:
        lines += ["", "environment variables"]
        loaded = facts["native_libraries"]["_C"]["loaded"]
        lines += _aligned([_variable_line(variable, loaded) for variable in facts["variables"]])
    if facts["tuned_tiles"]:
        lines += ["", "tuned tiles (beit-fast tune)"]
        lines += _aligned([_tuned_line(row) for row in facts["tuned_tiles"]])
    if facts["missing_kernels"] is not None:
        lines += ["", f"warning: {facts['missing_kernels']}"]
    sets = facts["instruction_sets"]
    if sets["used"] is not None:
        lines += ["", f"instruction set of the CPU kernels: {sets['used']} (usable here: {', '.join(sets['usable'])})"]
    return "\n".join([*lines, "", *_linear_lines(facts["linears"])])


def _linear_lines(linears: dict[str, Any]) -> list[str]:
    reason, training = linears["packed"]["reason"], linears["training"]
    packed = "oneDNN" if reason is None else f"no: {reason}"
    gemm = {"blas": "F.linear", "onednn": "oneDNN", "split_bf16": "AMX tiles", None: "none"}[training["gemm"]]
    return [
        f"packed linear layers: {packed}",
        f"float32 linear layers on cpu: {gemm} ({training['reason']})",
    ]


def _kernel_line(kernel: dict[str, Any]) -> tuple[str, ...]:
    verdict = "available" if kernel["available"] else "no: " + "; ".join(kernel["unsupported_reasons"])
    return kernel["kernel"], verdict


def _variable_line(variable: dict[str, str | None], is_native_loaded: bool) -> tuple[str, ...]:
    verdict = f"error: {variable['error']}" if variable["error"] else "accepted"
    if variable["name"] == variables.CPU_ISA and not is_native_loaded:
        verdict = "not read: the native library is not loaded"
    return f"{variable['name']}={variable['value']}", verdict


def _library_line(library: dict[str, Any]) -> str:
    if library["reason"] is not None:
        return f"{library['serves']}: {library['reason']}"
    built_for = f", built for {library['built_for']}" if library["built_for"] else ""
    state = "loaded" if library["loaded"] else "loaded at the first call"
    return f"{library['serves']}: {library['file']}{built_for} ({state})"


def _tuned_line(row: dict[str, Any]) -> tuple[str, ...]:
    return row["device"], f"{row['tiles']} in use" if row["reason"] is None else f"not in use: {row['reason']}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
