"""Whatever a user hands over as images or label maps, read and brought to one layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .options import CHANNELS_FIRST, CHANNELS_LAST

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Array: TypeAlias = "np.ndarray | Tensor"

_CHANNEL_COUNTS = (1, 3, 4)
_EXIF_ORIENTATION = 0x0112
_SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_ACCEPTED = "a Pillow image, a numpy array, a torch tensor, the path of a file, or lists and batches of these"


def read_images(images: Any, convert_rgb: bool | None, input_data_format: str | None) -> Iterator[Array]:
    """One after another, every image as an array or tensor `[C, H, W]` of the dtype and device it came with.

    Args:
        images: a Pillow image, a path, an array or tensor `[H, W]`, `[H, W, C]`, `[C, H, W]` or a batch of the latter
            two, or nested lists of all these.
        convert_rgb: None makes RGB of Pillow images and files, True of arrays of 1 or 4 channels as well, False
            of nothing.
        input_data_format: the place of the channels in arrays, found from the shape if None.

    Raises:
        FileNotFoundError: a path leads to no file.
        OSError: a file or a Pillow image cannot be decoded.
        TypeError, ValueError: something is no image, has no pixels, or its channels cannot be found.
    """
    for name, item in _named("image", _flatten(images, dimensions=3)):
        yield _read_image(item, name, convert_rgb, input_data_format)


def read_label_maps(label_maps: Any) -> list[Tensor]:
    """Every label map as int64 `[H, W]`: a copy unless it was an int64 tensor. Palette images give their indices.

    Raises: as `read_images`; ValueError also where labels are no whole numbers.
    """
    return [_read_label_map(item, name) for name, item in _named("segmentation map", _flatten(label_maps, 2))]


def _named(kind: str, items: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    for index, item in enumerate(items):
        is_path = isinstance(item, (str, os.PathLike))
        yield f"{kind} {index}" + (f" ({os.fspath(item)!r})" if is_path else ""), item


def _flatten(items: Any, dimensions: int) -> Iterator[Any]:
    """Single images out of nested lists and batches; `dimensions` of one image, a batch has one more."""
    if isinstance(items, (list, tuple)):
        for item in items:
            yield from _flatten(item, dimensions)
    elif isinstance(items, (np.ndarray, Tensor)) and items.ndim == dimensions + 1:
        is_one_map = dimensions == 2 and items.shape[-1] == 1 and items.shape[0] != 1
        yield from [items[..., 0]] if is_one_map else items
    else:
        yield items


def _read_image(image: Any, name: str, convert_rgb: bool | None, input_data_format: str | None) -> Array:
    if isinstance(image, (np.ndarray, Tensor)):
        pixels = _spread_flags(_channels_first(image, name, input_data_format))
        return _array_to_rgb(pixels, name) if convert_rgb else pixels
    image = _upright(_open(image, name), name)
    if convert_rgb is not False:
        image = _to_rgb(image, name)
    array = np.array(image.convert("L") if image.mode == "1" else image)
    return np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]


def _read_label_map(label_map: Any, name: str) -> Tensor:
    if not isinstance(label_map, (np.ndarray, Tensor)):
        label_map = np.array(_upright(_open(label_map, name), name))
    if label_map.ndim != 2:
        raise ValueError(f"{name} has the shape {list(label_map.shape)}; accepted: [H, W], one class id for each pixel")
    _refuse_empty(label_map, name)
    labels = label_map if isinstance(label_map, Tensor) else torch.from_numpy(_for_torch(label_map, name))
    if labels.dtype.is_complex or (labels.dtype.is_floating_point and not torch.equal(labels, labels.round())):
        raise ValueError(f"{name} holds {labels.dtype} values that are no whole numbers; accepted: class ids")
    return labels.long()


def _for_torch(array: np.ndarray, name: str) -> np.ndarray:
    """A copy in a type that torch computes with: the same one, or the wide one for wide or unsigned numbers."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "biuf":
        raise TypeError(f"{name} is an array of {array.dtype}; accepted: an array of numbers")
    if kind == "u" and size > 1:
        return array.astype(np.int64)
    return array.astype(np.float64 if size > 8 else array.dtype.newbyteorder("="))


def _open(image: Any, name: str) -> PillowImage:
    """The Pillow image itself or the one in a file, decoded."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return _decoded(image, name)
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError(f"{name} is of type {type(image).__name__}; accepted: {_ACCEPTED}")
    if not Path(image).is_file():
        is_address = isinstance(image, str) and image.startswith(("http://", "https://"))
        hint = "an address is not fetched: download the image first" if is_address else "there is no such file"
        raise FileNotFoundError(f"{name} cannot be read: {hint}")
    try:
        with Image.open(image) as opened:
            return _decoded(opened, name)
    except Image.UnidentifiedImageError as error:
        raise OSError(f"{name} cannot be read: Pillow knows no image format that begins like this file") from error
    except Image.DecompressionBombError as error:
        raise OSError(f"{name} cannot be read, PIL.Image.MAX_IMAGE_PIXELS sets the limit: {error}") from error


def _decoded(image: PillowImage, name: str) -> PillowImage:
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.width} x {image.height}")
    try:
        image.load()
    except (OSError, SyntaxError, EOFError, ValueError, IndexError) as error:  # Pillow's, by format, for broken files
        raise OSError(f"{name} cannot be decoded, the file is damaged or cut short: {error}") from error
    return image


def _upright(image: PillowImage, name: str) -> PillowImage:
    """The image turned as its EXIF orientation says, as every viewer shows it."""
    from PIL import ImageOps

    if image.getexif().get(_EXIF_ORIENTATION, 1) not in range(2, 9):
        return image
    return ImageOps.exif_transpose(image)


def _to_rgb(image: PillowImage, name: str) -> PillowImage:
    """RGB of any mode: what is transparent lies on white, 16 bits become 8."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BIT_MODES:
        return Image.fromarray(_eight_bits(np.array(image), name)).convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{name} has mode 'F', whose range is not fixed; pass it as an array with values from 0 to 1")
    if image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray, name: str) -> np.ndarray:
    """uint8 from 16 bits, 65535 becoming 255; Pillow's own conversion clips at 255."""
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"{name} has integers from {low} to {high}; accepted: 16-bit ones, from 0 to 65535")
    return ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)


def _channels_first(image: Array, name: str, input_data_format: str | None) -> Array:
    if image.ndim not in (2, 3):
        raise ValueError(
            f"{name} has the shape {list(image.shape)}; accepted: [H, W], [H, W, C], [C, H, W] or a batch of those"
        )
    _refuse_empty(image, name)
    if isinstance(image, np.ndarray):
        image = image if image.dtype == np.uint8 else _for_torch(image, name)
    if image.ndim == 2:
        return image[None]
    if (input_data_format or _find_format(image, name)) == CHANNELS_FIRST:
        return image
    return image.permute(2, 0, 1) if isinstance(image, Tensor) else np.moveaxis(image, -1, 0)


def _spread_flags(pixels: Array) -> Array:
    """Black and white as 0 and 255."""
    if isinstance(pixels, Tensor):
        return pixels.to(torch.uint8) * 255 if pixels.dtype == torch.bool else pixels
    return pixels.astype(np.uint8) * np.uint8(255) if pixels.dtype == np.bool_ else pixels


def _refuse_empty(image: Array, name: str) -> None:
    if 0 in image.shape:
        raise ValueError(f"{name} has no pixels: its shape is {list(image.shape)}")


def _find_format(image: Array, name: str) -> str:
    """Which end of the shape is the channels: the one of 1, 3 or 4, of two such ends the one of 3."""
    first, last = image.shape[0], image.shape[-1]
    for counts in (_CHANNEL_COUNTS, (3,)):
        if (first in counts) != (last in counts):
            return CHANNELS_FIRST if first in counts else CHANNELS_LAST
    reason = "either end could be" if first in _CHANNEL_COUNTS else "neither end can be"
    raise ValueError(
        f"{name} has the shape {list(image.shape)}, where {reason} its 1, 3 or 4 channels; pass input_data_format="
        f"{CHANNELS_FIRST!r} or {CHANNELS_LAST!r}"
    )


def _array_to_rgb(pixels: Array, name: str) -> Array:
    """`[C, H, W]` of 1, 3 or 4 channels (grey, RGB, RGBA over white) as `[3, H, W]`."""
    if len(pixels) == 3:
        return pixels
    if len(pixels) == 1:
        return pixels.expand(3, -1, -1) if isinstance(pixels, Tensor) else np.repeat(pixels, 3, axis=0)
    if len(pixels) != 4:
        raise ValueError(f"{name} has {len(pixels)} channels; do_convert_rgb takes 1, 3 or 4")
    tensor = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.ascontiguousarray(pixels))
    is_floating = tensor.dtype.is_floating_point
    white = 1.0 if is_floating else 255.0
    if tensor.min() < 0 or tensor.max() > white:
        raise ValueError(f"{name} has values outside [0, {white:g}], so its alpha has no meaning")
    color, alpha = tensor[:3].float(), tensor[3:].float() / white
    over_white = color * alpha + white * (1 - alpha)
    rgb = (over_white if is_floating else over_white.round()).to(tensor.dtype)
    return rgb if isinstance(pixels, Tensor) else rgb.numpy()


def as_levels(pixels: Tensor) -> tuple[Tensor, bool]:
    """uint8 levels of 0 to 255, and whether they were values from 0 to 1, to be brought back by 1 / 255.

    Raises:
        ValueError: the values are neither from 0 to 1 nor whole numbers from 0 to 255.
    """
    if pixels.dtype == torch.uint8:
        return pixels, False
    low, high = pixels.min().item(), pixels.max().item()
    is_floating = pixels.dtype.is_floating_point
    if is_floating and low >= 0 and high <= 1:
        return (pixels.float() * 255).round().to(torch.uint8), True
    levels = pixels.float().round() if is_floating else pixels
    if not (low >= 0 and high <= 255) or not torch.allclose(levels, pixels.to(levels.dtype)):
        raise ValueError(
            f"an image that is to be resized has {pixels.dtype} values from {low:g} to {high:g}; accepted: values "
            "from 0 to 1, or whole numbers from 0 to 255"
        )
    return levels.to(torch.uint8), False


def as_array(pixels: Array) -> np.ndarray:
    """The numbers of a tensor on any device as an array, bfloat16 as float32; an array as it is."""
    if isinstance(pixels, np.ndarray):
        return pixels
    pixels = pixels.detach().cpu()
    return (pixels.float() if pixels.dtype == torch.bfloat16 else pixels).numpy()


def as_tensor(pixels: Array, device: torch.device | str | None) -> Tensor:
    """A tensor on `device`, or where it is; an array is copied only if torch cannot share it."""
    if isinstance(pixels, np.ndarray):
        can_share = pixels.flags.writeable and min(pixels.strides) >= 0
        pixels = torch.from_numpy(pixels if can_share else pixels.copy(order="K"))
    return pixels.detach() if device is None else pixels.detach().to(device)


def is_unit_range(pixels: Array) -> bool:
    """Whether an image holds floating-point values from 0 to 1 (and is not all black)."""
    return "float" in str(pixels.dtype) and bool(0 < pixels.max() <= 1)
