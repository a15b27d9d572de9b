"""Compiles the attention kernels ahead of time, without a GPU, and prints what each cubin needs as JSON.

A script for a process of its own, because the interpreter and the compiler cannot share one. Its argument is
a JSON list of requests: `kernel`, `capability`, `dtype`, `head_dim`, and optionally `bias`, `mask`, `dropout`
and `precision`. It prints a list of `shared`, `stack`, `local`, `registers`, `instructions` in that order.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KERNELS_FOLDER = Path(__file__).resolve().parents[2] / "kernels"
SCORE_KERNELS = ("forward", "key_value_gradient", "query_gradient", "bias_gradient")
SMALL_KERNELS = ("expand_table", "delta", "patch_rows_gradient", "cls_rows_gradient")
ELEMENT = {"bf16": ("*bf16", 2), "fp16": ("*fp16", 2), "fp32": ("*fp32", 4)}

POINTER_TYPES = {
    "extended": "*fp32",
    "bias_table": "*fp32",
    "table": "*fp32",
    "grad_table": "*fp32",
    "grad_bias": "*fp32",
    "lse": "*fp32",
    "delta": "*fp32",
    "key_mask": "*i1",
}
FLOATS = ("scale", "scale_log2", "drop_scale")
ROWS = ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value")


def specialise(arg_names: list[str], constants: dict[str, Any], row_pointer: str) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of a usual launch: aligned pointers, strides that 16 divides."""
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    for position, name in enumerate(arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(position,)] = constants[name]
        elif name in ROWS or name in POINTER_TYPES:
            signature[name] = row_pointer if name in ROWS else POINTER_TYPES[name]
            attributes[(position,)] = divisible
        elif name in ("mask_strides", "table_strides"):
            signature[name] = ("i32", "constexpr")
            constexprs[(position, 1)] = 1
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            attributes.update({(position, axis): divisible for axis in range(3)})
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    return signature, constexprs, attributes


def kernel_and_constants(request: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The jitted function, its compile-time arguments and compile options, as the launcher chooses them."""
    from attention import backward, configs, forward

    name, head_dim = request["kernel"], request["head_dim"]
    if name in SMALL_KERNELS:
        owner = forward if name == "expand_table" else backward
        launcher_defaults = {"num_warps": 4, "num_stages": 3}
        return getattr(owner, f"{name}_kernel"), small_kernel_constants(name, head_dim), launcher_defaults

    major, minor = divmod(request["capability"], 10)
    block_d = configs.padded_head_dim(head_dim)
    config = configs.select(name, configs.architecture_class(major, minor), block_d, ELEMENT[request["dtype"]][1])
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "DROPOUT": request.get("dropout", False),
        "PRECISION": request.get("precision", "ieee"),
        "UPCAST": False,
    }
    if name == "key_value_gradient":
        constants.update(COMPUTE_KEY=True, COMPUTE_VALUE=True)
    if not request.get("bias", True):
        constants["bias_table"] = None
    if not request.get("mask", False):
        constants["key_mask"] = None
    kernel = forward.attention_forward_kernel if name == "forward" else getattr(backward, f"{name}_kernel")
    return kernel, constants, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def small_kernel_constants(name: str, head_dim: int) -> dict[str, Any]:
    """Compile-time arguments of the kernels that have no tiles to choose."""
    from attention import configs

    return {
        "expand_table": {"BLOCK": configs.EXPAND_BLOCK},
        "delta": {
            "HEAD_DIM": head_dim,
            "BLOCK_D": configs.padded_head_dim(head_dim),
            "BLOCK_M": configs.DELTA_BLOCK,
        },
        "patch_rows_gradient": {
            "BLOCK_P": configs.DIAGONAL_BLOCK_PATCHES,
            "BLOCK_V": configs.DIAGONAL_BLOCK_DIFFERENCES,
        },
        "cls_rows_gradient": {"BLOCK": configs.CLS_BLOCK},
    }[name]


def compile_request(request: dict[str, Any]) -> dict[str, int]:
    """Build one cubin and read its bytes of shared memory, stack and local memory, and registers a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, options = kernel_and_constants(request)
    row_pointer = ELEMENT[request["dtype"]][0]
    signature, constexprs, attributes = specialise(kernel.arg_names, constants, row_pointer)
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", request["capability"], 32),
        options=options,
    )
    return {"shared": compiled.metadata.shared, **cubin_resources(compiled.asm["cubin"])}


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """Stack, local memory, registers and machine instructions of a cubin's one kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool(tools / "cuobjdump", "--dump-resource-usage", file.name)
        disassembly = run_tool(tools / "nvdisasm", "-c", file.name)
    fields = {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", disassembly, flags=re.MULTILINE)
    return {
        "registers": fields["reg"],
        "stack": fields["stack"],
        "local": fields["local"],
        "instructions": len(instructions),
    }


def run_tool(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def main() -> None:
    sys.path.insert(0, str(KERNELS_FOLDER))
    requests = json.loads(sys.argv[1])
    print(json.dumps([compile_request(request) for request in requests]))


if __name__ == "__main__":
    main()
