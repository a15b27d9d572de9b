"""Count registers, spills and instructions of the attention kernels, without a GPU.

    python benchmarks/inspect_kernels.py                          # sm_80 and sm_90, bf16, D = 64
    python benchmarks/inspect_kernels.py --all --json kernels.json
    python benchmarks/inspect_kernels.py --kernel forward --capability 90 --tile 128,64,8,2 --markdown

Counts are those of the machine code. A row is a kernel, GPU architecture, tile and bias layout. Its columns are the
registers of a thread, spilled bytes, and shared memory of a program. Then come the instructions of the main loop per
scheduler for 64 x 64 scores, by pipe. The last columns are their ratio to the kernel without a bias, and the bound. The
bound is the largest of the least cycles for issue, tensor cores (mma), exp2 (xu), memory accesses (lsu) and arithmetic
(alu, fma): see kernels/aot/sass.py.

"shipped" is the tile that the launcher chooses, "reference" is 64x64 with 4 warps and 2 stages. Results are cached in
build/aot, or in the folder BEIT_FAST_AOT_CACHE, until the source of the kernels changes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

from beit_fast.kernels.aot import attention_variants, sass
from beit_fast.kernels.aot import compile as aot
from beit_fast.kernels.aot.attention_variants import Variant
from beit_fast.kernels.aot.compile import Inspection
from beit_fast.kernels.attention import configs

Row = dict[str, Any]

REFERENCE = configs.TileConfig(64, 64, 4, 2)
CACHE = Path(__file__).resolve().parent.parent / "build" / "aot"
COLUMNS = ("kernel", "sm", "tile", "bias", "registers", "spills", "shared KiB", "total", *sass.PIPES)
LAST_COLUMNS = ("to none", "bound")


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 0, or 1 if a kernel does not compile, or 2 if there is no compiler."""
    options = parse(arguments)
    variants = [
        variant
        for kernel in options.kernel
        for capability in options.capability
        for variant in variants_of(kernel, capability, options)
    ]
    cache = aot.cache_folder(CACHE)
    try:
        results = list(
            tqdm(
                aot.inspect_all(variants, cache, options.workers),
                desc="compiling",
                total=len(variants),
                disable=not sys.stderr.isatty(),
            )
        )
    except RuntimeError as error:
        print(f"inspect_kernels.py: {error}", file=sys.stderr)
        return 2
    failures = [found for _, found in results if isinstance(found, str)]
    rows = with_ratios([row(variant, found) for variant, found in results if not isinstance(found, str)])
    if options.json is not None:
        options.json.write_text(json.dumps({"conditions": conditions(options), "rows": rows}, indent=1) + "\n")
    print(markdown(rows) if options.markdown else text(rows))
    for failure in failures:
        print(f"inspect_kernels.py: {failure}", file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the options; exit with 2 and a message if they are not valid."""
    parser = argparse.ArgumentParser(
        description="Count registers, spills and instructions of the attention kernels, without a GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--kernel", nargs="+", choices=configs.KERNELS, default=list(configs.KERNELS))
    parser.add_argument("--capability", nargs="+", type=int, choices=aot.CAPABILITIES, default=[80, 90])
    parser.add_argument("--all", action="store_true", help="every architecture")
    parser.add_argument("--head-dim", type=head_dim, default=64, help="a multiple of 8 from 8 to 128")
    parser.add_argument("--dtype", choices=aot.DTYPES, default="bf16")
    parser.add_argument("--precision", choices=("ieee", "tf32"), default="ieee", help="of products in fp32")
    parser.add_argument("--key-mask", action="store_true", help="with a key mask")
    parser.add_argument("--dropout", action="store_true", help="with dropout of attention weights")
    parser.add_argument("--tile", type=tile, help="M,N,WARPS,STAGES instead of the shipped and the reference tile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--workers", type=int, choices=range(1, 65), default=1, metavar="N", help="compiling processes")
    options = parser.parse_args(arguments)
    if options.precision == "tf32" and options.dtype != "fp32":
        parser.error(f"--precision tf32 is for --dtype fp32, got --dtype {options.dtype}")
    if options.all:
        options.capability = list(aot.CAPABILITIES)
    return options


def head_dim(given: str) -> int:
    """Parse a head dimension of the kernels."""
    if not given.isdecimal() or int(given) % 8 or not 8 <= int(given) <= configs.HEAD_DIMS[-1]:
        raise argparse.ArgumentTypeError(f"{given!r} is not a multiple of 8 from 8 to {configs.HEAD_DIMS[-1]}")
    return int(given)


def tile(given: str) -> configs.TileConfig:
    """Parse the four numbers of a tile."""
    numbers = [int(part) if part.isdecimal() else 0 for part in given.split(",")]
    powers = all(number > 0 and number & (number - 1) == 0 for number in numbers[:3])
    if len(numbers) != 4 or not powers or min(numbers[:2]) < 16 or numbers[2] > 32 or numbers[3] < 1:
        raise argparse.ArgumentTypeError(
            f"{given!r} is not M,N,WARPS,STAGES: M and N powers of two from 16, WARPS one up to 32, STAGES from 1"
        )
    return configs.TileConfig(*numbers)


def variants_of(kernel: str, capability: int, options: argparse.Namespace) -> list[Variant]:
    """List every tile with every bias layout; the bias gradient needs a bias."""
    layouts = list(dict.fromkeys([configs.NO_BIAS, *attention_variants.bias_layouts(capability, options.dtype)]))
    if kernel == "backward_dbias":
        layouts.remove(configs.NO_BIAS)
    variant = Variant(
        kernel,
        capability,
        options.tile,
        options.dtype,
        options.precision,
        options.head_dim,
        key_mask=options.key_mask,
        dropout=options.dropout,
    )
    shipped = attention_variants.shipped(variant).tile
    tiles = [options.tile] if options.tile else list(dict.fromkeys([shipped, REFERENCE]))
    return [variant._replace(tile=tile, bias_layout=layout) for tile in tiles for layout in layouts]


def row(variant: Variant, found: Inspection) -> Row:
    """Build one line of the table from JSON values."""
    work = attention_variants.work(variant)
    by_pipe = sass.instructions_by_pipe(found.loop, work)
    cycles = sass.cycles_by_pipe(found.loop, work)
    return {
        "kernel": variant.kernel,
        "capability": variant.capability,
        "tile": variant.tile,
        "shipped": variant == attention_variants.shipped(variant),
        "bias": attention_variants.layout_name(variant.bias_layout),
        "registers": found.registers,
        "spills": found.spills,
        "shared": found.shared,
        "instructions": sum(by_pipe.values()),
        "by_pipe": by_pipe,
        "cycles": cycles,
        "bound": sass.bound(cycles),
        "unknown": sorted(name for name in found.loop if not sass.is_known(name)),
    }


def with_ratios(rows: list[Row]) -> list[Row]:
    """Add `to_none`: the ratio of instructions to the kernel without a bias, or None without such a kernel."""
    base = {
        (row["kernel"], row["capability"], row["tile"]): row["instructions"] for row in rows if row["bias"] == "none"
    }
    for row in rows:
        without = base.get((row["kernel"], row["capability"], row["tile"]))
        row["to_none"] = row["instructions"] / without if without else None
    return rows


def conditions(options: argparse.Namespace) -> Row:
    """Return the conditions of the table."""
    names = ("dtype", "precision", "head_dim", "key_mask", "dropout")
    return {"triton": triton.__version__, "per": "64 x 64 scores", **{name: getattr(options, name) for name in names}}


def cells(row: Row) -> list[str]:
    """Format the cells of a row."""
    tile_name = attention_variants.tile_name(row["tile"])
    names = [name for name, holds in (("shipped", row["shipped"]), ("reference", row["tile"] == REFERENCE)) if holds]
    counts = [f"{row['by_pipe'][pipe]:.0f}" for pipe in sass.PIPES]
    return [
        row["kernel"],
        str(row["capability"]),
        f"{tile_name} ({', '.join(names)})" if names else tile_name,
        row["bias"],
        str(row["registers"]),
        str(row["spills"]),
        f"{row['shared'] / 1024:.0f}",
        f"{row['instructions']:.0f}",
        *counts,
        f"{row['to_none']:.2f}" if row["to_none"] else "",
        f"{row['bound']} {row['cycles'][row['bound']]:.0f}",
    ]


def text(rows: list[Row]) -> str:
    """Format aligned columns: words to the left, numbers to the right."""
    lines = [[*COLUMNS, *LAST_COLUMNS], *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if _is_word(column) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(rows: list[Row]) -> str:
    """Format the table as Markdown."""
    header = [*COLUMNS, *LAST_COLUMNS]
    rule = ["---" if _is_word(column) else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *(cells(row) for row in rows)])


def _is_word(column: int) -> bool:
    return column in (0, 2, 3, len(COLUMNS) + len(LAST_COLUMNS) - 1)


if __name__ == "__main__":
    sys.exit(main())
