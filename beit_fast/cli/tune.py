"""`beit-fast tune`: measure the tiles of the GPU kernels, and use the fastest from then on."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from ..configuration import BeitConfig
from ..ops.dispatch import availability
from ..tuning import tune as tuning
from ..tuning.timer import clock_of
from ..tuning.tune_jobs import Shape, jobs_of
from .collect_env import environment
from .devices import parse_device
from .measurements import RowLog, check_variables, interrupted, milliseconds, table_lines
from .options import ExitCode, TuneOptions

BASE = Shape((14, 14), 64, torch.bfloat16)
USUAL = ((224, 64), (384, 16), (384, 1))
"""Image sizes and batches of BEiT-base, in bfloat16."""
PATCH = 16
_HEADER = ("kernel", "shape", "shipped", "chosen", "ms shipped", "ms chosen", "excluded")


def tune(options: TuneOptions) -> int:
    """Measure, show or delete tuned tiles, and return the exit code: 1 if a shipped tile is wrong."""
    check_variables()
    device = _gpu(options.device)
    if options.forget:
        files = [str(file) for file in tuning.forget(device)]
        print(json.dumps({"deleted": files}, indent=1) if options.json else "\n".join(_deleted_lines(files)))
        return ExitCode.DONE
    if options.show:
        found = tuning.describe(device)
        print(json.dumps(found, indent=1) if options.json else "\n".join(_shown_lines(found)))
        return ExitCode.DONE
    return _measure(options, device)


def _measure(options: TuneOptions, device: torch.device) -> int:
    """Measure, and print what was found, also after an interrupt; return the exit code."""
    shapes = shapes_of(options)
    _check_kernels(shapes, device)
    jobs, conditions = jobs_of(shapes, device), environment(device)
    log, outcomes, is_interrupted = RowLog(options.rows, conditions), [], False
    started = time.monotonic()
    with tqdm(total=len(jobs), unit="kernel", disable=None) as bar:
        try:
            for outcome in tuning.tune(jobs, device, functools.partial(clock_of, device)):
                outcomes.append(outcome)
                log.add(outcome.as_json())
                bar.set_postfix_str(f"{outcome.kernel} {outcome.label}", refresh=False)
                bar.update()
                if options.budget is not None and time.monotonic() - started > options.budget:
                    break
        except KeyboardInterrupt:
            is_interrupted = True
    file = tuning.describe(device)["file"]
    if options.json:
        listed = [outcome.as_json() for outcome in outcomes]
        facts = {"environment": conditions, "file": file, "interrupted": is_interrupted, "rows": listed}
        print(json.dumps(facts, indent=1))
    else:
        print("\n".join(_outcome_lines(outcomes, file)))
    if is_interrupted:
        return interrupted("tune", f"{len(outcomes)} of {len(jobs)} kernels")
    wrong = any(outcome.chosen is None for outcome in outcomes)
    return ExitCode.SOME_FAILED if wrong else ExitCode.DONE


def _gpu(name: str | None) -> torch.device:
    """Return the CUDA device of that name.

    Raises:
        ValueError: If it is not a CUDA device of this machine.
    """
    device = parse_device(name or "cuda")
    if device.type != "cuda" or not torch.cuda.is_available():
        found = "torch finds no CUDA device" if device.type == "cuda" else f"{device} is not a CUDA device"
        raise ValueError(f"only GPU kernels can be tuned, but {found}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _check_kernels(shapes: Sequence[Shape], device: torch.device) -> None:
    """Check that the Triton kernels serve.

    Raises:
        ValueError: If they do not serve; the error lists every reason.
    """
    kernel: availability.KernelName = "triton" if device.type == "cuda" else "triton-interpret"
    reasons = dict.fromkeys(
        reason
        for shape in shapes
        for reason in availability.attention_unsupported_reasons(kernel, device, shape.dtype, shape.head_dim)
    )
    if reasons:
        raise ValueError(f"the kernels do not run on {device}: {'; '.join(reasons)}")


def shapes_of(options: TuneOptions) -> list[Shape]:
    """List the shapes that the options ask for; without any, the usual ones."""
    model, patch, image = BASE, (PATCH, PATCH), None
    if options.model is not None:
        config = BeitConfig.from_pretrained(options.model, local_files_only=options.local_files_only)
        patch, image = _pair(config.patch_size), config.image_size
        model = _shape_of_model(config)
    elif options.head_dim is not None:
        hidden = BASE.heads * options.head_dim
        model = replace(BASE, head_dim=options.head_dim, hidden=hidden, intermediate=4 * hidden)
    dtypes = [getattr(torch, name) for name in options.dtype] or [BASE.dtype]
    sizes = list(options.image_size)
    if not sizes and image is not None:
        sizes = [image]
    if sizes or options.batch:
        batches = options.batch or [16]
        chosen = list(itertools.product(sizes or list(dict.fromkeys(size for size, _ in USUAL)), batches))
    else:
        chosen = list(USUAL)
    return [
        replace(model, window=_window(_pair(size), patch), batch=batch, dtype=dtype)
        for dtype in dtypes
        for size, batch in chosen
    ]


def _shape_of_model(config: BeitConfig) -> Shape:
    biased = config.use_relative_position_bias or config.use_shared_relative_position_bias
    heads, hidden = config.num_attention_heads, config.hidden_size
    return replace(
        BASE,
        heads=heads,
        head_dim=hidden // heads,
        hidden=hidden,
        intermediate=config.intermediate_size,
        biased=biased,
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _window(image: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Return the patches of an image.

    Raises:
        ValueError: If the image is smaller than a patch.
    """
    window = (image[0] // patch[0], image[1] // patch[1])
    if 0 in window:
        raise ValueError(f"an image of {image[0]}x{image[1]} pixels has no patch of {patch[0]}x{patch[1]}")
    return window


def _outcome_lines(outcomes: Sequence[tuning.Outcome], file: str) -> list[str]:
    lines = table_lines(_HEADER, [_cells(outcome) for outcome in outcomes])
    for outcome in outcomes:
        if outcome.excluded:
            lines += ["", f"excluded from {outcome.kernel}, {outcome.label}:"]
            lines += [f"  {tile}: {reason}" for tile, reason in outcome.excluded.items()]
    if any(outcome.chosen is None for outcome in outcomes):
        lines += ["", "A shipped tile does not compute what it should: run beit-fast selftest."]
    if all(outcome.chosen is None for outcome in outcomes):
        return [*lines, "", "nothing was written"]
    return [*lines, "", f"written to {file}; BEIT_FAST_TUNED=0 ignores it, beit-fast tune --forget deletes it"]


def _cells(outcome: tuning.Outcome) -> tuple[str, ...]:
    shipped = tuning.tile_name(outcome.shipped)
    chosen = "none" if outcome.chosen is None else tuning.tile_name(outcome.chosen)
    times = [milliseconds(outcome.seconds[name]) if name in outcome.seconds else "-" for name in (shipped, chosen)]
    return (outcome.kernel, outcome.label, shipped, chosen, *times, str(len(outcome.excluded)))


def _shown_lines(found: dict[str, Any]) -> list[str]:
    if found["reason"] is not None:
        return [f"no tuned tiles are in use: {found['reason']}", f"file: {found['file']}"]
    header = ("kernel", "variant", "amount", "tile", "ms", "ms shipped")
    rows = [
        (
            *(entry["kernel"], entry["variant"], str(entry["amount"]), tuning.tile_name(tuple(entry["tile"]))),
            *(milliseconds(entry[name]) for name in ("seconds", "shipped_seconds")),
        )
        for entry in found["tiles"]
    ]
    return [*table_lines(header, rows), "", f"file: {found['file']}"]


def _deleted_lines(files: Sequence[str]) -> list[str]:
    return [f"deleted {file}" for file in files] or ["there are no tuned tiles of this GPU"]
