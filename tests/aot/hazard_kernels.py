"""The smallest kernels that some release of Triton compiles wrongly, and paths through their PTX that show it.

A sound compiler orders three pairs of accesses in these kernels:

- `copied_product`: `cp.async` writes shared memory as ordinary stores do, in the generic proxy, and `wgmma` and
  `tcgen05.mma` read it in the async proxy. The PTX ISA demands `fence.proxy.async` between accesses of two proxies.
- `owned_product`: as above, where one operand is stored before the loop and fenced there. Its fence does not order the
  copies of the loop.
- `chained_products`: scores are loaded from tensor memory by eight warps, and the accumulator of the next product is
  stored over them. Warps 4 to 7 store columns that warps 0 to 3 load, which needs a barrier.

`triton-lang/triton#9610`, `#10537` (3.7.1) and `#10263` (3.8) changed the compiler in these places.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copied_product(a, b, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Sum `a @ b^T` over steps; both operands are copied."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        x = tl.load(a + step * M * K + rows[:, None] * K + depth[None, :])
        y = tl.load(b + step * N * K + columns[:, None] * K + depth[None, :])
        acc = tl.dot(x, tl.trans(y), acc)
    tl.store(out + rows[:, None] * N + columns[None, :], acc)


@triton.jit
def owned_product(a, b, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Sum `(a @ b^T) @ b` over steps; only `b` is copied."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + rows[:, None] * K + depth[None, :])
    acc = tl.zeros([M, K], tl.float32)
    for step in range(steps):
        y = tl.load(b + step * N * K + columns[:, None] * K + depth[None, :])
        scores = tl.dot(x, tl.trans(y))
        acc += tl.dot(scores.to(y.dtype), y)
    tl.store(out + rows[:, None] * K + depth[None, :], acc)


@triton.jit
def chained_products(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Compute `(a @ b^T) @ b` of one tile."""
    rows, columns, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + rows[:, None] * K + depth[None, :])
    y = tl.load(b + columns[:, None] * K + depth[None, :])
    scores = tl.dot(x, tl.trans(y))
    tl.store(out + rows[:, None] * K + depth[None, :], tl.dot(scores.to(y.dtype), y))


SHAPES = {copied_product: (128, 64, 64), owned_product: (128, 64, 64), chained_products: (128, 64, 32)}
"""M, N and K; every kernel has 8 warps and 2 stages."""


def compile_to_ptx(kernel: Any, capability: int) -> str:
    """Compile one of SHAPES for bf16."""
    constants = dict(zip("MNK", SHAPES[kernel], strict=True))
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "steps": "i32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(3)}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        compiled = triton.compile(
            ASTSource(kernel, signature, places, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 8, "num_stages": 2},
        )
        return compiled.asm["ptx"]


def has_path(ptx: str, start: str, end: str, between: str) -> bool:
    """Return whether control can pass from `start` to `end` and meet no `between`; these are regular expressions."""
    lines = [line for line in map(str.strip, ptx.splitlines()) if line and not line.startswith(("//", "."))]
    labels = {line.split(":")[0]: place for place, line in enumerate(lines) if re.match(r"\$\w+:", line)}
    waiting = [place + 1 for place, line in enumerate(lines) if re.search(start, line)]
    seen: set[int] = set()
    while waiting:
        place = waiting.pop()
        if place in seen or place >= len(lines) or re.search(between, lines[place]):
            continue
        seen.add(place)
        if re.search(end, lines[place]):
            return True
        waiting += _successors(lines[place], place, labels)
    return False


def _successors(line: str, place: int, labels: dict[str, int]) -> Iterator[int]:
    branch = re.search(r"\bbra(\.uni)?\s+(\$\w+);", line)
    if branch is not None:
        yield labels[branch[2]]
    # A branch without a predicate does not fall through.
    if branch is None or line.startswith("@"):
        yield place + 1


def reads_copies_unfenced(ptx: str) -> bool:
    """Return whether a product may follow the wait for copies without a proxy fence."""
    return has_path(ptx, r"cp\.async\.wait_group", r"wgmma\.mma_async|tcgen05\.mma", r"fence\.proxy\.async")


def overwrites_loads(ptx: str) -> bool:
    """Return whether a store to tensor memory may follow a load without a barrier."""
    return has_path(ptx, r"tcgen05\.ld", r"tcgen05\.st", r"bar\.sync")
