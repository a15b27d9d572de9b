"""Find the image processor of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration.beit_config import BeitConfig
from ..utils.files import CONFIG_NAME, read_json_object
from ..utils.hub import HubOptions, Repository, local_folder
from .processor import PREPROCESSOR_NAME, BeitImageProcessor
from .timm_options import normalization_entries, resize_options


def find_processor(
    name_or_path: str | os.PathLike[str], config: BeitConfig, hub: HubOptions
) -> BeitImageProcessor | None:
    """Find the image processor of a checkpoint; nothing is guessed.

    The first of these that the checkpoint has decides:

    1. `preprocessor_config.json` beside the weights.
    2. `pixel_mean` and `pixel_std` of `config`, for images of its size. `pixel_resize` of `config` has the filter and
       the crop. Without it the whole image is resized bicubically.
    3. `pretrained_cfg` in a `config.json` of timm.

    Args:
        name_or_path: A folder, a weights file or a hub repository.
        config: The configuration of the model.
        hub: Arguments of `huggingface_hub`.

    Returns:
        The processor, or None if the checkpoint says nothing about preprocessing.

    Raises:
        ValueError: If a file is damaged, or its preprocessing is not supported.
    """
    file = _file_beside(name_or_path, PREPROCESSOR_NAME, hub)
    if file is not None:
        return BeitImageProcessor.from_json_file(file)
    size = config.image_height_width
    if config.pixel_mean is not None and config.pixel_std is not None:
        resize = {"size": size} if config.pixel_resize is None else resize_options(config.pixel_resize, size)
        return BeitImageProcessor(**resize, image_mean=config.pixel_mean, image_std=config.pixel_std)
    pretrained_cfg = _timm_entries(_file_beside(name_or_path, CONFIG_NAME, hub))
    normalization = normalization_entries(pretrained_cfg, config.num_channels)
    if normalization is None:
        return None
    mean, std = normalization
    return BeitImageProcessor(**resize_options(pretrained_cfg, size), image_mean=mean, image_std=std)


def unknown_preprocessing(name_or_path: str | os.PathLike[str], remedy: str) -> ValueError:
    """Return the error of callers for which `find_processor` finds nothing.

    Args:
        name_or_path: The checkpoint.
        remedy: What the user can do.
    """
    where = "beside it" if Path(name_or_path).expanduser().exists() else "in the cache or on the network"
    return ValueError(
        f"the preprocessing of {os.fspath(name_or_path)!r} is not known: there is no {PREPROCESSOR_NAME} {where}, and "
        f"its {CONFIG_NAME} has neither pixel_mean and pixel_std nor timm's pretrained_cfg, nor has the file timm's "
        f"training options with mean, std and crop_pct; {remedy}"
    )


def fit_to_image_size(processor: BeitImageProcessor, image_size: tuple[int, int]) -> BeitImageProcessor:
    """Copy `processor` for a model of another image size (height, width).

    If the processor crops, `size` keeps its ratio to `crop_size`.
    """
    options = processor.to_dict()
    size, crop = options["size"], options["crop_size"] if options["do_center_crop"] else {}
    if options["do_resize"]:
        options["size"] = {name: _fitted(name, edge, size, crop, image_size) for name, edge in size.items()}
    if crop:
        options["crop_size"] = image_size
    return type(processor).from_dict(options)


def _fitted(name: str, edge: int, size: Mapping[str, int], crop: Mapping[str, int], image_size: tuple[int, int]) -> int:
    """Scale one entry of `size`; without a crop, the edge is that of `image_size`."""
    axis = name.removeprefix("max_")
    if axis in ("height", "width"):
        return round(edge * image_size[axis == "width"] / crop.get(axis, edge))
    reference = max(crop.values()) if crop else size["shortest_edge"]
    return round(edge * max(image_size) / reference)


def _file_beside(name_or_path: str | os.PathLike[str], file_name: str, hub: HubOptions) -> Path | None:
    """Find a file beside a checkpoint, or in its repository."""
    path = Path(name_or_path).expanduser()
    if not path.exists():
        return Repository(os.fspath(name_or_path), hub).fetch_optional(file_name)
    file = (local_folder(path, hub) if path.is_dir() else path.parent) / file_name
    return file if file.is_file() else None


def _timm_entries(config_file: Path | None) -> Mapping[str, Any]:
    """Return `pretrained_cfg` of a `config.json` that timm wrote.

    The dict is empty if there is none.
    """
    values = {} if config_file is None else read_json_object(config_file)
    if "model_type" in values:
        return {}
    nested = values.get("pretrained_cfg")
    return nested if isinstance(nested, dict) else values  # older versions of timm write one flat dict
