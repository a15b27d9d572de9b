"""Options and exit codes of the commands; `main` fills them from the command line."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

Format: TypeAlias = Literal["jsonl", "parquet"]
Output: TypeAlias = Literal["classes", "logits", "features"]
Start: TypeAlias = Literal["resume", "overwrite", "retry-failed"]

TASKS = {
    "model": "BeitModel",
    "masked-image-modeling": "BeitForMaskedImageModeling",
    "image-classification": "BeitForImageClassification",
    "semantic-segmentation": "BeitForSemanticSegmentation",
    "backbone": "BeitBackbone",
}
"""Values of `--task` and the class of each."""


class ExitCode(enum.IntEnum):
    """Exit codes of all commands; argparse exits with `ERROR` by itself."""

    DONE = 0
    SOME_FAILED = 1
    ERROR = 2
    INTERRUPTED = 130
    CLOSED_PIPE = 141


@dataclass(frozen=True)
class InfoOptions:
    """Options of `beit-fast info`."""

    json: bool


@dataclass(frozen=True)
class SelftestOptions:
    """Options of `beit-fast selftest`.

    Attributes:
        device: The device, or None for CUDA if it is available, else the CPU.
        include_refused: If True, also run kernels that are refused because Triton compiles them wrongly.
        json: If True, print one JSON object instead of a table.
        rows: A file that gets each row as a line of JSON as soon as it is known, or None.
    """

    device: str | None
    include_refused: bool
    json: bool
    rows: Path | None


@dataclass(frozen=True)
class TuneOptions:
    """Options of `beit-fast tune`.

    Attributes:
        image_size: Image sizes; empty for the usual ones.
        batch: Numbers of images; empty for the usual ones.
        dtype: Names of dtypes; empty for bfloat16.
        model: A checkpoint whose configuration gives the sizes, or None for those of BEiT-base.
        head_dim: Numbers of a head, or None for those of the model.
        device: The CUDA device, or None for the current one.
        budget: Seconds after which no other kernel is started, or None.
        forget: If True, delete the tuned tiles.
        show: If True, print the tuned tiles.
        local_files_only: If True, never use the network.
        json: If True, print one JSON object instead of a table.
        rows: A file that gets each result as a line of JSON as soon as it is known, or None.
    """

    image_size: Sequence[int | tuple[int, int]]
    batch: Sequence[int]
    dtype: Sequence[str]
    model: str | None
    head_dim: int | None
    device: str | None
    budget: float | None
    forget: bool
    show: bool
    local_files_only: bool
    json: bool
    rows: Path | None


@dataclass(frozen=True)
class ModelOptions:
    """Options that every command with a model has.

    Attributes:
        model: A folder, a file or a name on the hub.
        processor: The source of the image processor, or None for the checkpoint's.
        attn: The attention implementation, or None to choose it by device and dtype.
        device: The device, or None for CUDA if it is available, else the CPU.
        dtype: The dtype of the weights, or None for the checkpoint's.
        local_files_only: If True, never use the network.
        json: If True, print one JSON object instead of text.
    """

    model: str
    processor: str | None
    attn: str | None
    device: str | None
    dtype: str | None
    local_files_only: bool
    json: bool


@dataclass(frozen=True)
class ClassifyOptions(ModelOptions):
    """Options of `beit-fast classify`.

    Attributes:
        images: The image files.
        top: The number of classes to print.
        batch_size: Images in one forward.
        csv: If True, print CSV instead of text.
    """

    images: Sequence[str]
    top: int
    batch_size: int
    csv: bool


@dataclass(frozen=True)
class SegmentOptions(ModelOptions):
    """Options of `beit-fast segment`.

    Attributes:
        images: Image files and folders of images.
        out: The picture to write, or the folder of pictures if there are several images or a folder.
        labels: The picture, or folder, of the classes as 16-bit gray, or None.
        opacity: The opacity of the colors, 0 to 1.
        legend: If True, draw the classes that occur below the picture.
    """

    images: Sequence[str]
    out: Path
    labels: Path | None
    opacity: float
    legend: bool


@dataclass(frozen=True)
class PredictOptions(ModelOptions):
    """Options of `beit-fast predict`.

    Attributes:
        dataset: A folder of images, or a text file with one path per line.
        out: The file to write.
        format: The format of `out`, or None to infer it from the name.
        output: What to record of each image.
        top: The number of classes to record.
        batch_size: Images in one forward.
        workers: Processes that read images, or None for the default; 0 reads them in the main process.
        optimize: If True, run the model through `optimize_for_inference`.
        start: Resume the run, start it from the beginning, or run the batches with failed images again.
    """

    dataset: str
    out: Path
    format: Format | None
    output: Output
    top: int
    batch_size: int
    workers: int | None
    optimize: bool
    start: Start


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `beit-fast convert`."""

    source: str
    target: Path
    task: str | None
    processor: str | None
    image_size: int | tuple[int, int] | None
    position_interpolation: str
    dtype: str | None
    local_files_only: bool
