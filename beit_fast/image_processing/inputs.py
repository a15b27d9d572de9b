"""Read images and label maps from files, Pillow images, arrays and tensors."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..utils.messages import join_choices
from ..utils.tensors import unreadable_reason
from .image_files import open_image_file
from .options import CHANNELS_FIRST, CHANNELS_LAST

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

Array: TypeAlias = "np.ndarray | Tensor"

_CHANNEL_COUNTS = (1, 3, 4)
_EXIF_ORIENTATION = 0x0112
_INTEGER_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_LABEL_MODES = ("1", "L", "P", *_INTEGER_MODES)
# Some versions of Pillow open the 16 bits of these formats as mode "I" with 32 bits.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
_EXPECTED = "a Pillow image, a numpy array, a torch tensor, the path of a file, or lists and batches of these"


def read_images(images: Any, convert_rgb: bool | None, input_data_format: str | None) -> Iterator[Array]:
    """Yield every image as an array or tensor `[C, H, W]`.

    The dtype and device of an array or tensor do not change.

    Args:
        images: A Pillow image, a path, an array or tensor `[H, W]`, `[H, W, C]` or `[C, H, W]`, a batch of the latter
            two, or nested lists of these.
        convert_rgb: What to convert to RGB. None: Pillow images and files. True: also arrays of 1 or 4 channels.
            False: nothing.
        input_data_format: The channel dimension of arrays; None infers it from the shape.

    Raises:
        FileNotFoundError: If a file does not exist.
        OSError: If a file or a Pillow image cannot be decoded.
        TypeError: If an input is not an image.
        ValueError: If an image has no pixels, its channel dimension cannot be inferred, or its tensor has no values or
            is not dense.
    """
    for name, item in _named("image", images, dimensions=3):
        yield _read_image(item, name, convert_rgb, input_data_format)


def read_label_maps(label_maps: Any) -> list[Tensor]:
    """Read every label map as int64 `[H, W]`; palette images become their indices.

    An int64 tensor is returned without a copy.

    Raises:
        ValueError: If labels are not integers, or as in `read_images`.
        FileNotFoundError, OSError, TypeError: As in `read_images`.
    """
    return [_read_label_map(item, name) for name, item in _named("segmentation map", label_maps, dimensions=2)]


def read_rgb(image: Any, name: str) -> PillowImage:
    """Read an upright RGB image of Pillow.

    Args:
        image: A path, the encoded bytes of a file, or a Pillow image.
        name: The image, for errors.

    Raises:
        FileNotFoundError, OSError, TypeError, ValueError: As in `read_images`.
    """
    opened = _open(image, name)
    return _to_rgb(_upright(opened, name), name, opened.format)


def read_label_image(image: Any, name: str) -> PillowImage:
    """Read an upright image of class ids.

    Its mode stays as stored: palette images keep their indices.

    Raises:
        ValueError: If the image has colors, not class ids.
        FileNotFoundError, OSError, TypeError: As in `read_images`.
    """
    opened = _upright(_open(image, name), name)
    if opened.mode not in _LABEL_MODES:
        raise ValueError(
            f"{name} has mode {opened.mode!r} (expected one class id for each pixel: mode {join_choices(_LABEL_MODES)})"
        )
    return opened


def _named(kind: str, items: Any, dimensions: int) -> Iterator[tuple[str, Any]]:
    """Yield single images with a name for errors; one path needs no index."""
    if isinstance(items, (str, os.PathLike)):
        yield f"{kind} {os.fspath(items)!r}", items
        return
    for index, item in enumerate(_flatten(items, dimensions)):
        is_path = isinstance(item, (str, os.PathLike))
        yield f"{kind} {index}" + (f" ({os.fspath(item)!r})" if is_path else ""), item


def _flatten(items: Any, dimensions: int) -> Iterator[Any]:
    """Yield single images from nested lists and batches; an image has `dimensions` dimensions."""
    if isinstance(items, (list, tuple)):
        for item in items:
            yield from _flatten(item, dimensions)
    elif isinstance(items, Tensor) and items.layout != torch.strided:
        yield items
    elif isinstance(items, (np.ndarray, Tensor)) and items.ndim == dimensions + 1:
        is_one_map = dimensions == 2 and items.shape[-1] == 1 and items.shape[0] != 1
        yield from [items[..., 0]] if is_one_map else items
    else:
        yield items


def _read_image(image: Any, name: str, convert_rgb: bool | None, input_data_format: str | None) -> Array:
    if isinstance(image, (np.ndarray, Tensor)):
        _check_readable(image, name)
        pixels = _bool_to_levels(_channels_first(image, name, input_data_format))
        return _array_to_rgb(pixels, name) if convert_rgb else pixels
    opened = _open(image, name)
    image = _upright(opened, name)
    if convert_rgb is not False:
        image = _to_rgb(image, name, opened.format)
    array = np.array(image.convert("L") if image.mode == "1" else image)
    return np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]


def _read_label_map(label_map: Any, name: str) -> Tensor:
    if not isinstance(label_map, (np.ndarray, Tensor)):
        label_map = np.array(_upright(_open(label_map, name), name))
    _check_readable(label_map, name)
    if label_map.ndim != 2:
        raise ValueError(f"{name} has the shape {list(label_map.shape)} (expected [H, W], one class id for each pixel)")
    _check_not_empty(label_map, name)
    labels = label_map if isinstance(label_map, Tensor) else torch.from_numpy(_for_torch(label_map, name))
    if labels.dtype.is_complex or (labels.dtype.is_floating_point and not torch.equal(labels, labels.round())):
        raise ValueError(f"{name} has {labels.dtype} values that are not integers (expected class ids)")
    return labels.long()


def _for_torch(array: np.ndarray, name: str) -> np.ndarray:
    """Copy to a dtype that torch supports: the same one, or int64 or float64."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    if kind not in "biuf":
        raise TypeError(f"{name} is an array of {array.dtype} (expected an array of numbers)")
    if kind == "u" and size > 1:
        return array.astype(np.int64)
    return array.astype(np.float64 if size > 8 else array.dtype.newbyteorder("="))


def _open(image: Any, name: str) -> PillowImage:
    """Decode a Pillow image or a file."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return _decoded(image, name)
    if not isinstance(image, (str, os.PathLike, io.BytesIO)):
        raise TypeError(f"{name} is of type {type(image).__name__} (expected {_EXPECTED})")
    with open_image_file(image, name) as opened:
        return _decoded(opened, name)


def _decoded(image: PillowImage, name: str) -> PillowImage:
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its size is {image.width} x {image.height}")
    try:
        image.load()
    except (OSError, SyntaxError, EOFError, ValueError, IndexError) as error:  # Pillow's errors for damaged files
        raise OSError(f"{name} cannot be decoded, the file is damaged or truncated: {error}") from error
    return image


def _upright(image: PillowImage, name: str) -> PillowImage:
    """Apply the EXIF orientation."""
    from PIL import ImageOps

    if image.getexif().get(_EXIF_ORIENTATION, 1) not in range(2, 9):
        return image
    return ImageOps.exif_transpose(image)


def _to_rgb(image: PillowImage, name: str, file_format: str | None) -> PillowImage:
    """Convert an image of any mode to RGB.

    Transparent pixels are placed over white. 16 bits are scaled to 8; 32 bits up to 255 are 8 bits already.
    """
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _INTEGER_MODES:
        has_sixteen_bits = image.mode != "I" or file_format in _SIXTEEN_BIT_FORMATS
        return Image.fromarray(_eight_bits(np.array(image), name, has_sixteen_bits)).convert("RGB")
    if image.mode == "F":
        raise ValueError(
            f"{name} has mode 'F', floating point without a fixed range (expected an image file of 8 or 16 bits, or an "
            "array with values from 0 to 1)"
        )
    if image.mode.lower().endswith("a") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray, name: str, has_sixteen_bits: bool) -> np.ndarray:
    """Scale 16 bits to uint8 (65535 to 255); Pillow's conversion clips at 255.

    Without `has_sixteen_bits`, values up to 255 are not scaled.
    """
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"{name} has integers from {low} to {high} (expected 0 to 65535)")
    if high <= 255 and not has_sixteen_bits:
        return pixels.astype(np.uint8)
    return ((pixels.astype(np.int64) + 128) // 257).astype(np.uint8)


def _channels_first(image: Array, name: str, input_data_format: str | None) -> Array:
    if image.ndim not in (2, 3):
        raise ValueError(
            f"{name} has the shape {list(image.shape)} (expected [H, W], [H, W, C], [C, H, W] or a batch of these)"
        )
    _check_not_empty(image, name)
    if isinstance(image, np.ndarray):
        image = image if image.dtype == np.uint8 else _for_torch(image, name)
    if image.ndim == 2:
        return image[None]
    if (input_data_format or _find_format(image, name)) == CHANNELS_FIRST:
        return image
    return image.permute(2, 0, 1) if isinstance(image, Tensor) else np.moveaxis(image, -1, 0)


def _bool_to_levels(pixels: Array) -> Array:
    """Convert bool to uint8 0 and 255."""
    if isinstance(pixels, Tensor):
        return pixels.to(torch.uint8) * 255 if pixels.dtype == torch.bool else pixels
    return pixels.astype(np.uint8) * np.uint8(255) if pixels.dtype == np.bool_ else pixels


def _check_readable(image: Array, name: str) -> None:
    if isinstance(image, Tensor) and (reason := unreadable_reason(image)):
        raise ValueError(f"{name} {reason}")


def _check_not_empty(image: Array, name: str) -> None:
    if 0 in image.shape:
        raise ValueError(f"{name} has no pixels: its shape is {list(image.shape)}")


def _find_format(image: Array, name: str) -> str:
    """Infer the channel dimension: 1, 3 or 4 channels; if both ends fit, the one of 3."""
    first, last = image.shape[0], image.shape[-1]
    for counts in (_CHANNEL_COUNTS, (3,)):
        if (first in counts) != (last in counts):
            return CHANNELS_FIRST if first in counts else CHANNELS_LAST
    reason = "both ends" if first in _CHANNEL_COUNTS else "neither end"
    raise ValueError(
        f"{name} has the shape {list(image.shape)}: {reason} can be 1, 3 or 4 channels. Pass input_data_format="
        f"{CHANNELS_FIRST!r} or {CHANNELS_LAST!r}"
    )


def _array_to_rgb(pixels: Array, name: str) -> Array:
    """Convert pixels `[C, H, W]` to RGB `[3, H, W]`.

    The 1, 3 or 4 channels are gray, RGB or RGBA. RGBA is placed over white.
    """
    if len(pixels) == 3:
        return pixels
    if len(pixels) == 1:
        return pixels.expand(3, -1, -1) if isinstance(pixels, Tensor) else np.repeat(pixels, 3, axis=0)
    if len(pixels) != 4:
        raise ValueError(f"{name} has {len(pixels)} channels (do_convert_rgb supports 1, 3 or 4)")
    tensor = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.ascontiguousarray(pixels))
    is_floating = tensor.dtype.is_floating_point
    white = 1.0 if is_floating else 255.0
    if tensor.min() < 0 or tensor.max() > white:
        raise ValueError(f"{name} has values outside [0, {white:g}], which alpha blending does not support")
    color, alpha = tensor[:3].float(), tensor[3:].float() / white
    over_white = color * alpha + white * (1 - alpha)
    rgb = (over_white if is_floating else over_white.round()).to(tensor.dtype)
    return rgb if isinstance(pixels, Tensor) else rgb.numpy()


def as_levels(pixels: Tensor) -> tuple[Tensor, bool]:
    """Convert pixels to uint8 levels.

    Returns:
        The levels, and whether the pixels had values from 0 to 1.

    Raises:
        ValueError: If the values are neither from 0 to 1 nor integers from 0 to 255.
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
            f"an image cannot be resized: it has {pixels.dtype} values from {low:g} to {high:g} (expected values "
            "from 0 to 1, or integers from 0 to 255)"
        )
    return levels.to(torch.uint8), False


def as_array(pixels: Array) -> np.ndarray:
    """Convert a tensor on any device to an array, bfloat16 to float32; return an array unchanged."""
    if isinstance(pixels, np.ndarray):
        return pixels
    pixels = pixels.detach().cpu()
    return (pixels.float() if pixels.dtype == torch.bfloat16 else pixels).numpy()


def as_tensor(pixels: Array, device: torch.device | str | None) -> Tensor:
    """Convert to a tensor on `device` (None: no transfer); copy an array only if torch cannot share its memory."""
    if isinstance(pixels, np.ndarray):
        can_share = pixels.flags.writeable and min(pixels.strides) >= 0
        pixels = torch.from_numpy(pixels if can_share else pixels.copy(order="K"))
    return pixels.detach() if device is None else pixels.detach().to(device)


def is_unit_range(pixels: Array) -> bool:
    """Return whether an image has floating-point values from 0 to 1.

    The result is False for a black image.
    """
    return "float" in str(pixels.dtype) and bool(0 < pixels.max() <= 1)
