"""The targets: which row of ours has to be how many times better than which row of a peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..harness.results import ATTENTION, Row

OURS = "beit_fast triton"


@dataclass(frozen=True)
class Target:
    """`theirs[quantity] / ours[quantity]` has to be at least `needed`, wherever ours was measured.

    against: whether a row takes part; the one with the smallest quantity counts.
    where: the cases that it is asked of; unless given, those in 16 bits.
    peer: whose reason for staying away is told where nobody takes part, if it is one peer.
    device, bench, ours: which rows it is about, and which of them are ours.
    """

    text: str
    mode: str
    needed: float
    against: Callable[[Row], bool]
    quantity: str = "median"
    where: Callable[[Row], bool] = lambda row: row["dtype"] != "fp32"
    peer: str | None = None
    device: str = "cuda"
    bench: str = ATTENTION
    ours: str = OURS


def _named(name: str) -> Callable[[Row], bool]:
    return lambda row: row["peer"] == name


def _learnable(row: Row) -> bool:
    return bool(row["learnable"]) and row["peer"] != OURS


def _learnable_sdpa(row: Row) -> bool:
    return _learnable(row) and "sdpa" in row["peer"]


_FLASH = "sdpa without bias flash"
_READY_EFFICIENT = "sdpa prebuilt bias efficient"
_READY_CUDNN = "sdpa prebuilt bias cudnn"
_READY = "sdpa prebuilt bias"
_GATHERED = "transformers sdpa"
_ON_CPU: dict[str, Any] = {"device": "cpu", "bench": "cpu attention"}
_PATCHES = "beit_fast fused"
_OF_PATCHES: dict[str, Any] = {"device": "cpu", "bench": "cpu patch embedding", "ours": _PATCHES}

_OF_OPERATORS = (
    Target("forward no slower than SDPA flash without bias", "forward", 1.0, _named(_FLASH), peer=_FLASH),
    Target("forward 1.5x the best path whose bias can be learned", "forward", 1.5, _learnable),
    Target(
        "forward 1.5x memory-efficient SDPA with a ready mask",
        "forward",
        1.5,
        _named(_READY_EFFICIENT),
        peer=_READY_EFFICIENT,
    ),
    Target(
        "forward no slower than cuDNN with a ready, frozen mask",
        "forward",
        1.0,
        _named(_READY_CUDNN),
        peer=_READY_CUDNN,
    ),
    Target("forward + backward with the table 3x the best peer", "training", 3.0, _learnable),
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
        peer=_READY,
        **_ON_CPU,
    ),
    Target(
        "fp32 forward 3.5x SDPA with the gather that Transformers does in each layer",
        "forward",
        3.5,
        _named(_GATHERED),
        where=lambda row: row["dtype"] == "fp32",
        peer=_GATHERED,
        **_ON_CPU,
    ),
    Target(
        "bf16 forward 3x SDPA in bf16 with a ready mask",
        "forward",
        3.0,
        _named(_READY),
        where=lambda row: row["dtype"] == "bf16",
        peer=_READY,
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
        lambda row: row["peer"] != _PATCHES,
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        **_OF_PATCHES,
    ),
    Target(
        "patch embedding faster than the best of them, in most cases",
        "float pixels",
        1.0,
        lambda row: row["peer"] != _PATCHES,
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        **_OF_PATCHES,
    ),
    Target(
        "patch embedding of bytes 1.3x normalise + conv + cat + add",
        "uint8 pixels",
        1.3,
        _named("normalise + conv"),
        where=lambda row: row["dtype"] in ("fp32", "bf16"),
        peer="normalise + conv",
        **_OF_PATCHES,
    ),
)

_OPTIMIZED = "beit_fast optimized"
_COMPILED = "transformers sdpa compiled"
_LEVEL = 0.97  # within 3 % is level
_INFERENCE_ON_CPU: dict[str, Any] = {"device": "cpu", "bench": "cpu models", "ours": _OPTIMIZED}
_TRAINING_ON_CPU: dict[str, Any] = {"device": "cpu", "bench": "cpu models"}
_INFERENCE_ON_CUDA: dict[str, Any] = {"bench": "models", "ours": _OPTIMIZED}


def _model(model: str, image: int, dtype: str, *batches: int) -> Callable[[Row], bool]:
    """Rows of a model, with any batch where none is given."""
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
            peer=_GATHERED,
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
            peer=_GATHERED,
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
            peer="openvino",
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
            peer=_GATHERED,
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
        peer="openvino",
        **_INFERENCE_ON_CPU,
    ),
    Target(
        f"a forward at 640 adds at most a third of what {_GATHERED} adds",
        "inference",
        3.0,
        _named(_GATHERED),
        quantity="peak_memory",
        where=lambda row: row["image"] == 640,
        peer=_GATHERED,
        **_INFERENCE_ON_CPU,
    ),
    Target(
        f"training step of base 224 B=4 fp32 1.5x {_GATHERED}",
        "training",
        1.5,
        _named(_GATHERED),
        where=_model("base", 224, "fp32", 4),
        peer=_GATHERED,
        **_TRAINING_ON_CPU,
    ),
    *(
        Target(
            f"base 224 B={batch} bf16 {needed}x {peer}",
            "inference",
            needed,
            _named(peer),
            where=_model("base", 224, "bf16", batch),
            peer=peer,
            **_INFERENCE_ON_CUDA,
        )
        for batch, needed, peer in ((64, 2.0, _GATHERED), (64, 1.3, _COMPILED), (1, 4.0, _GATHERED))
    ),
    Target(
        f"large 640 bf16 2x {_GATHERED}",
        "inference",
        2.0,
        _named(_GATHERED),
        where=_model("large", 640, "bf16"),
        peer=_GATHERED,
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
            peer=_GATHERED,
            bench="models",
        )
        for what, quantity in (("2x", "median"), ("with half the memory of", "peak_memory"))
    ),
)

TARGETS = (*_OF_OPERATORS, *_OF_MODELS)
