"""The targets: ratios that rows of beit_fast have to reach over rows of baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..harness import pretraining_cases
from ..harness.results import ATTENTION, Row

OURS = "beit_fast triton"


@dataclass(frozen=True)
class Target:
    """A bound: `theirs[quantity] / ours[quantity]` is at least `needed` in every measured case.

    Attributes:
        text: Description.
        mode: Mode of the rows.
        needed: Least ratio.
        is_baseline: Selects the rows to compare with; the one with the smallest quantity counts.
        quantity: Field to compare.
        where: Selects the cases; by default those in 16 bits.
        baseline: Name of the baseline, if it is a single one, to report why it is missing.
        device: Device of the rows.
        bench: Benchmark of the rows.
        ours: Name of our rows.
    """

    text: str
    mode: str
    needed: float
    is_baseline: Callable[[Row], bool]
    quantity: str = "median"
    where: Callable[[Row], bool] = lambda row: row["dtype"] != "fp32"
    baseline: str | None = None
    device: str = "cuda"
    bench: str = ATTENTION
    ours: str = OURS


def _named(name: str) -> Callable[[Row], bool]:
    return lambda row: row["baseline"] == name


def _learnable(row: Row) -> bool:
    return bool(row["learnable"]) and row["baseline"] != OURS


def _learnable_sdpa(row: Row) -> bool:
    return _learnable(row) and "sdpa" in row["baseline"]


_FLASH = "sdpa without bias flash"
_READY_EFFICIENT = "sdpa prebuilt bias efficient"
_READY_CUDNN = "sdpa prebuilt bias cudnn"
_READY = "sdpa prebuilt bias"
_GATHERED = "transformers sdpa"
_ON_CPU: dict[str, Any] = {"device": "cpu", "bench": "cpu attention"}
_PATCHES = "beit_fast fused"
_OF_PATCHES: dict[str, Any] = {"device": "cpu", "bench": "cpu patch embedding", "ours": _PATCHES}

_OF_OPERATORS = (
    Target("forward no slower than SDPA flash without bias", "forward", 1.0, _named(_FLASH), baseline=_FLASH),
    Target("forward 1.5x the best path whose bias can be learned", "forward", 1.5, _learnable),
    Target(
        "forward 1.5x memory-efficient SDPA with a ready mask",
        "forward",
        1.5,
        _named(_READY_EFFICIENT),
        baseline=_READY_EFFICIENT,
    ),
    Target(
        "forward no slower than cuDNN with a ready, frozen mask",
        "forward",
        1.0,
        _named(_READY_CUDNN),
        baseline=_READY_CUDNN,
    ),
    Target("forward + backward with the table 3x the best baseline", "training", 3.0, _learnable),
    Target(
        "forward + backward memory at most 0.3x SDPA's",
        "training",
        1 / 0.3,
        _learnable_sdpa,
        quantity="peak_memory",
        where=lambda row: (row["batch"], row["tokens"], row["dtype"]) == (8, 1601, "bf16"),
    ),
    Target(
        "fp32 forward 2.2x SDPA with a ready mask",
        "forward",
        2.2,
        _named(_READY),
        where=lambda row: row["dtype"] == "fp32",
        baseline=_READY,
        **_ON_CPU,
    ),
    Target(
        "fp32 forward 3.5x SDPA with the gather that Transformers does in each layer",
        "forward",
        3.5,
        _named(_GATHERED),
        where=lambda row: row["dtype"] == "fp32",
        baseline=_GATHERED,
        **_ON_CPU,
    ),
    Target(
        "bf16 forward 3x SDPA in bf16 with a ready mask",
        "forward",
        3.0,
        _named(_READY),
        where=lambda row: row["dtype"] == "bf16",
        baseline=_READY,
        **_ON_CPU,
    ),
    Target(
        "forward + backward with the table 3x SDPA's",
        "training",
        3.0,
        _learnable_sdpa,
        where=lambda row: row["tokens"] in (577, 1025),
        **_ON_CPU,
    ),
    Target(
        "forward + backward memory under a tenth of SDPA's",
        "training",
        10.0,
        _learnable_sdpa,
        quantity="peak_memory",
        where=lambda row: row["tokens"] == 1601,
        **_ON_CPU,
    ),
    Target(
        "patch embedding 0.97x the best of conv, conv channels_last and unfold + linear",
        "float pixels",
        0.97,
        lambda row: row["baseline"] != _PATCHES,
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        **_OF_PATCHES,
    ),
    Target(
        "patch embedding faster than the best of them, in most cases",
        "float pixels",
        1.0,
        lambda row: row["baseline"] != _PATCHES,
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        **_OF_PATCHES,
    ),
    Target(
        "patch embedding of bytes 1.3x normalize + conv + cat + add",
        "uint8 pixels",
        1.3,
        _named("normalize + conv"),
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        baseline="normalize + conv",
        **_OF_PATCHES,
    ),
)

_OPTIMIZED = "beit_fast optimized"
_COMPILED = "transformers sdpa compiled"
_LEVEL = 0.97  # level: within 3 %
_INFERENCE_ON_CPU: dict[str, Any] = {"device": "cpu", "bench": "cpu models", "ours": _OPTIMIZED}
_TRAINING_ON_CPU: dict[str, Any] = {"device": "cpu", "bench": "cpu models"}
_INFERENCE_ON_CUDA: dict[str, Any] = {"bench": "models", "ours": _OPTIMIZED}


def _model(model: str, image: int, dtype: str, *batches: int) -> Callable[[Row], bool]:
    """Select rows of a model; without `batches`, of any batch."""
    return lambda row: (
        (row["model"], row["image"], row["dtype"]) == (model, image, dtype) and (not batches or row["batch"] in batches)
    )


_CPU_SIZES = (  # image, batch, dtype, how many times as fast as Transformers sdpa
    (224, 1, "fp32", 2.8),
    (224, 8, "fp32", 2.4),
    (640, 1, "fp32", 3.6),
    (224, 1, "bf16", 1.35),
    (640, 1, "bf16", 3.2),
)
_OF_MODELS = (
    *(
        Target(
            f"base {image} B={batch} fp32 {needed}x {_GATHERED}, at float32_matmul_precision high",
            "inference",
            needed,
            _named(_GATHERED),
            where=_model("base", image, "fp32", batch),
            baseline=_GATHERED,
            **(_INFERENCE_ON_CPU | {"ours": f"{_OPTIMIZED} high"}),
        )
        for image, batch, dtype, needed in _CPU_SIZES
        if dtype == "fp32"
    ),
    *(
        Target(
            f"base {image} B={batch} {dtype} {needed}x {_GATHERED}",
            "inference",
            needed,
            _named(_GATHERED),
            where=_model("base", image, dtype, batch),
            baseline=_GATHERED,
            **_INFERENCE_ON_CPU,
        )
        for image, batch, dtype, needed in _CPU_SIZES
    ),
    *(
        Target(
            f"base {image} B={batch} {dtype} level with OpenVINO",
            "inference",
            _LEVEL,
            _named("openvino"),
            where=_model("base", image, dtype, batch),
            baseline="openvino",
            **_INFERENCE_ON_CPU,
        )
        for image, batch, dtype, _ in _CPU_SIZES
    ),
    *(
        Target(
            f"accelerated Transformers {needed}x {_GATHERED}, base 640 B=1 {dtype}",
            "inference",
            needed,
            _named(_GATHERED),
            where=_model("base", 640, dtype, 1),
            baseline=_GATHERED,
            **(_INFERENCE_ON_CPU | {"ours": "transformers accelerated"}),
        )
        for dtype, needed in (("fp32", 1.7), ("bf16", 2.0))
    ),
    Target(
        "goal: 1.05x OpenVINO at 640",
        "inference",
        1.05,
        _named("openvino"),
        where=lambda row: (row["model"], row["image"]) == ("base", 640) and row["dtype"] != "fp16",
        baseline="openvino",
        **_INFERENCE_ON_CPU,
    ),
    Target(
        f"a forward at 640 adds at most a third of what {_GATHERED} adds",
        "inference",
        3.0,
        _named(_GATHERED),
        quantity="peak_memory",
        where=lambda row: row["image"] == 640,
        baseline=_GATHERED,
        **_INFERENCE_ON_CPU,
    ),
    Target(
        f"training step of base 224 B=4 fp32 1.5x {_GATHERED}",
        "training",
        1.5,
        _named(_GATHERED),
        where=_model("base", 224, "fp32", 4),
        baseline=_GATHERED,
        **_TRAINING_ON_CPU,
    ),
    *(
        Target(
            f"base 224 B={batch} bf16 {needed}x {baseline}",
            "inference",
            needed,
            _named(baseline),
            where=_model("base", 224, "bf16", batch),
            baseline=baseline,
            **_INFERENCE_ON_CUDA,
        )
        for batch, needed, baseline in ((64, 2.0, _GATHERED), (64, 1.3, _COMPILED), (1, 4.0, _GATHERED))
    ),
    Target(
        f"large 640 bf16 2x {_GATHERED}",
        "inference",
        2.0,
        _named(_GATHERED),
        where=_model("large", 640, "bf16"),
        baseline=_GATHERED,
        **_INFERENCE_ON_CUDA,
    ),
    *(
        Target(
            f"training step of large 640 bf16 {what} {_GATHERED}",
            "training",
            2.0,
            _named(_GATHERED),
            quantity=quantity,
            where=_model("large", 640, "bf16"),
            baseline=_GATHERED,
            bench="models",
        )
        for what, quantity in (("2x", "median"), ("with half the memory of", "peak_memory"))
    ),
)

_OF_PRETRAINING = tuple(
    Target(
        f"pre-training step of base 224 fp32 1.45x {baseline}, where oneDNN or AMX serve",
        pretraining_cases.PRETRAINING,
        1.45,
        _named(baseline),
        where=_model("base", 224, "fp32"),
        baseline=baseline,
        device="cpu",
        bench=pretraining_cases.BENCHES["cpu"],
    )
    for baseline in (_GATHERED, "transformers eager")
)

TARGETS = (*_OF_OPERATORS, *_OF_MODELS, *_OF_PRETRAINING)
