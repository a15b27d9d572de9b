"""Pillow and NumPy image processor with Transformers' options and files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, TypeAlias, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.files import atomic_write_text, json_text, plain, read_json_object
from ..utils.foreign_names import suggest_options
from ..utils.hub import HubOptions, find_options
from ..utils.json_file import JsonFile
from ..utils.messages import describe
from ..utils.paths import as_path
from .batch_feature import BatchFeature
from .inputs import Array, as_array, as_levels, as_tensor, is_unit_range, read_images, read_label_maps
from .options import (
    CHANNELS_LAST,
    DEFAULTS,
    OPTION_NAMES,
    checked,
    with_current_names,
    with_steps_off,
    without_contradiction,
)
from .resampling import center_crop, resize_array, resize_nearest, resized_size

PREPROCESSOR_NAME = "preprocessor_config.json"
IGNORED_LABEL = 255

# Arguments of Transformers' `from_pretrained` that are not options of a processor.
_NOT_OPTIONS = (
    *("image_processor_filename", "proxies", "trust_remote_code", "code_revision", "use_fast", "backend"),
    *("_from_auto", "_from_pipeline", "_commit_hash", "user_agent"),
)
_WRITER_FIELDS = ("image_processor_type", "feature_extractor_type")
_SAME_OPTIONS = ("Beit", "ViT")  # prefixes of the classes whose files hold these options and no others

Options: TypeAlias = dict[str, Any]


class BeitImageProcessor(JsonFile):
    """Preprocess images and label maps one by one with Pillow.

    Args:
        do_resize, size, resample: Resize to `size` with a filter of Pillow. `size` is an int, a (height, width)
            pair, or a dict of height and width, of shortest_edge and optionally longest_edge, or of max_height and
            max_width.
        default_to_square: Whether an int `size` is both edges rather than the shortest one.
        do_center_crop, crop_size: Crop the center. Smaller images are padded with zeros.
        do_rescale, rescale_factor: Multiply by the factor.
        do_normalize, image_mean, image_std: Normalize by one number, or one for each channel.
        do_reduce_labels: Subtract 1 from class ids. 0 becomes 255, and 255 does not change. The old name is
            `reduce_labels`.
        do_convert_rgb: What to convert to RGB. None: Pillow images and files. True: also arrays of 1 or 4 channels.
            False: nothing.
        return_tensors: `"pt"` or `"np"` for one tensor or array, None for a list.
        data_format: `"channels_first"` (None) or `"channels_last"`, for pixel values.
        input_data_format: The same for arrays that are passed; None infers it from the shape.
        device: The device of tensors. This class requires `return_tensors="pt"` with it.
        disable_grouping: An option of `BeitImageProcessorFast` without effect here.

    Each option is an attribute that can be set. Other fields of a file are in `other_fields` and are saved again. A
    typo or a name of timm gets a warning.

    The EXIF orientation of Pillow images and files is applied first. Conversion to RGB blends transparent pixels
    over white and scales 16 bits to 8. Images of 32-bit integers are 8 bits if no value exceeds 255, else 16.
    Floating-point arrays have values from 0 to 1, or integers up to 255. They are rounded to 8 bits if resized.

    Label maps are resized by nearest neighbor and cropped like the images. They are padded with 255, which the loss
    ignores. The array passed is not modified. Transformers 5 resizes label maps with `resample`, which creates new
    class ids, pads them with 0, and modifies the array.

    Raises:
        TypeError, ValueError: If options are not valid; the error lists all of them.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    _file_name: ClassVar[str] = PREPROCESSOR_NAME
    _written_type: ClassVar[str] = "BeitImageProcessor"  # a name that AutoImageProcessor knows, also for subclasses

    def __init__(self, **options: Any) -> None:
        owner = type(self).__name__
        given = {name: value for name, value in with_current_names(owner, options).items() if value is not None}
        self.other_fields = {
            name: plain(value) for name, value in given.items() if name not in DEFAULTS and name not in _WRITER_FIELDS
        }
        for name, value in self.other_fields.items():
            if advice := suggest_options([name], OPTION_NAMES):
                text = f"{describe(name, value)} is not an option of {owner} and has no effect{advice}"
                warnings.warn(text, UserWarning, stacklevel=2)
        known = {name: given.get(name, default) for name, default in plain(DEFAULTS).items()}
        self.__dict__.update(checked(owner, known))

    def __call__(self, images: Any, segmentation_maps: Any = None, **overrides: Any) -> BatchFeature:
        """`preprocess`."""
        return self.preprocess(images, segmentation_maps, **overrides)

    def preprocess(self, images: Any, segmentation_maps: Any = None, **overrides: Any) -> BatchFeature:
        """Compute pixel values, and labels if label maps are passed.

        Args:
            images: Pillow images, paths, arrays or tensors `[H, W]`, `[H, W, C]` or `[C, H, W]`, batches or lists.
            segmentation_maps: One map of class ids `[H, W]` for each image, in any of these forms.
            overrides: Options of the constructor for this call. None does not override.

        Returns:
            `pixel_values` `[B, C, H, W]`, float32 if rescaled or normalized, and `labels` int64 `[B, H, W]`.

        Raises:
            FileNotFoundError: If a file does not exist.
            OSError: If a file cannot be decoded.
            TypeError: If images or options have a wrong type.
            ValueError: If images or options are not valid, or results of several sizes would be stacked.
        """
        options = self._options(overrides)
        were_rescaled: list[bool] = []
        pixel_values = self._pixel_values(_read_and_record(images, options, were_rescaled), options)
        if len(pixel_values) == 0:
            raise ValueError(f"{type(self).__name__} got no images")
        if any(were_rescaled):
            message = "images with floating-point values from 0 to 1 are rescaled again; pass do_rescale=False"
            warnings.warn(message, UserWarning, stacklevel=2)
        count = len(pixel_values)
        if options["data_format"] == CHANNELS_LAST:
            pixel_values = [_channels_last(image) for image in pixel_values]
        features = BatchFeature(pixel_values=_collect(pixel_values, "pixel_values", options))
        if segmentation_maps is not None:
            features.labels = _collect(self._labels(segmentation_maps, count, options), "labels", options)
        return features

    def _options(self, overrides: Mapping[str, Any]) -> Options:
        owner = type(self).__name__
        overrides = with_current_names(owner, overrides)
        unknown = [name for name in overrides if name not in DEFAULTS]
        if unknown:
            advice = suggest_options(unknown, OPTION_NAMES)
            raise TypeError(f"{owner} has no option {', '.join(unknown)} (expected {', '.join(DEFAULTS)}){advice}")
        given = {name: value for name, value in overrides.items() if value is not None}
        return checked(owner, {name: getattr(self, name) for name in DEFAULTS} | given)

    def _pixel_values(self, images: Iterable[Array], options: Options) -> Sequence[Any] | Tensor:
        """Process images `[C, H, W]` to a list or one batch.

        The images are arrays or tensors of any size and dtype.
        """
        if options["device"] is not None and options["return_tensors"] != "pt":
            raise ValueError(f"device={options['device']} requires return_tensors='pt'")
        return [self._process(as_array(image), options) for image in images]

    def _process(self, pixels: np.ndarray, options: Options) -> np.ndarray:
        was_unit_range = False
        if options["do_resize"]:
            if pixels.dtype != np.uint8:
                levels, was_unit_range = as_levels(as_tensor(pixels, None))
                pixels = levels.numpy()
            size = resized_size(pixels.shape[1], pixels.shape[2], options["size"])
            resized = resize_array(np.moveaxis(pixels, 0, -1), size, options["resample"])
            pixels = np.moveaxis(resized, -1, 0)
        if options["do_center_crop"]:
            pixels = center_crop(pixels, size_pair(options["crop_size"]))
        scale_and_shift = affine(options, len(pixels), was_unit_range)
        if scale_and_shift is None:
            return np.ascontiguousarray(pixels)
        scale, shift = (np.array(numbers, dtype=np.float32)[:, None, None] for numbers in scale_and_shift)
        values = np.multiply(pixels, scale, out=np.empty(pixels.shape, dtype=np.float32), casting="same_kind")
        values += shift
        return values

    def _labels(self, segmentation_maps: Any, images: int, options: Options) -> Sequence[Any]:
        label_maps = read_label_maps(segmentation_maps)
        self._check_count(label_maps, images)
        return [as_array(label_map) for label_map in self._process_labels(label_maps, options)]

    @staticmethod
    def _check_count(label_maps: Sequence[Tensor], images: int) -> None:
        if len(label_maps) != images:
            raise ValueError(f"expected {images} segmentation maps for {images} images, got {len(label_maps)}")

    def _process_labels(self, label_maps: Sequence[Tensor], options: Options) -> list[Tensor]:
        processed = []
        for labels in label_maps:
            if options["do_resize"]:
                labels = resize_nearest(labels, resized_size(labels.shape[0], labels.shape[1], options["size"]))
            if options["do_reduce_labels"]:
                labels = reduce_labels(labels)
            if options["do_center_crop"]:
                labels = center_crop(labels, size_pair(options["crop_size"]), fill=IGNORED_LABEL)
            processed.append(labels)
        return processed

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, return_segmentation_scores: bool = False
    ) -> list[Any]:
        """Compute class ids int64 `[h, w]` of each image.

        Args:
            outputs: Outputs of `BeitForSemanticSegmentation`, or a mapping, with logits `[B, num_labels, h, w]`.
            target_sizes: (height, width) of each result, as pairs or a tensor `[B, 2]`. Logits are resized
                bilinearly; None does not resize them.
            return_segmentation_scores: Return a `BatchFeature` for each image, with `segmentation` and the resized
                logits `segmentation_scores` `[num_labels, h, w]`.

        Raises:
            ValueError: If the number of sizes is not the number of images.
        """
        scores = list(outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits)
        if target_sizes is not None:
            sizes = [(int(height), int(width)) for height, width in target_sizes]
            if len(sizes) != len(scores):
                raise ValueError(f"expected {len(scores)} target_sizes for {len(scores)} images, got {len(sizes)}")
            scores = [
                F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
                for logits, size in zip(scores, sizes, strict=True)
            ]
        maps = [logits.argmax(dim=0) for logits in scores]
        if not return_segmentation_scores:
            return maps
        return [BatchFeature(segmentation=m, segmentation_scores=s) for m, s in zip(maps, scores, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Copy the options and the other fields, with JSON's types.

        Options that are None are left out.
        """
        values = {name: getattr(self, name) for name in DEFAULTS}
        values = {name: value for name, value in values.items() if value is not None}
        if values["default_to_square"]:
            del values["default_to_square"]
        if "device" in values:
            values["device"] = str(values["device"])
        return {**self.other_fields, **plain(values), "image_processor_type": self._written_type}

    def to_json_string(self) -> str:
        """`to_dict()` as JSON with sorted keys."""
        return json_text(self.to_dict(), owner=type(self).__name__)

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json_string()` to `path` atomically."""
        atomic_write_text(as_path("the image processor", path), self.to_json_string())

    def _text_to_save(self) -> str:
        return self.to_json_string()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], /, **overrides: Any) -> Self:
        """Create a processor from the result of `to_dict()`, with `overrides`.

        Results of Transformers 4 and 5 are also supported. A step that is None, such as `do_resize`, is off. None does
        not override.

        Raises:
            ValueError: If another class wrote the fields, whose steps may differ.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}.from_dict expects a dict of options, not a {type(values).__name__}")
        written_by = next((values[name] for name in _WRITER_FIELDS if values.get(name)), "Beit")
        if not str(written_by).startswith(_SAME_OPTIONS):
            raise ValueError(
                f"options of {written_by} are not supported, its steps may differ (expected options of "
                "BeitImageProcessor, BeitFeatureExtractor, ViTImageProcessor or ViTFeatureExtractor)"
            )
        given = {name: value for name, value in overrides.items() if value is not None}
        stored = with_current_names(cls.__name__, without_contradiction(with_steps_off(values)))
        return cls(**(stored | with_current_names(cls.__name__, given)))

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], /, **overrides: Any) -> Self:
        """Read a processor from a JSON file.

        Files of Transformers 4 and 5 are also supported.
        """
        return cls.from_dict(read_json_object(as_path("the image processor", path)), **overrides)

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], /, *, return_unused_kwargs: Literal[False] = False, **options: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], /, *, return_unused_kwargs: Literal[True], **options: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], /, *, return_unused_kwargs: bool = False, **options: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read a processor from a folder, a JSON file or the hub.

        Args:
            name_or_path: A path, or the name of a hub repository such as "org/name".
            return_unused_kwargs: Return `(processor, unused)`, with the options that the class does not have.
            options: Overrides of the options of the file, and `revision`, `cache_dir`, `token`, `local_files_only`,
                `force_download` and `subfolder` as in `huggingface_hub`. `image_processor_filename` is the name of
                the file. `trust_remote_code`, `code_revision`, `proxies`, `use_fast` and `backend` have no effect: code
                never runs, `huggingface_hub` reads `HTTPS_PROXY`, and the class is the one that was called.

        Raises:
            FileNotFoundError: If there is no `preprocessor_config.json`.
        """
        hub = HubOptions(**{name: options[name] for name in HubOptions._fields if options.get(name) is not None})
        file_name = options.get("image_processor_filename") or PREPROCESSOR_NAME
        file = find_options(name_or_path, file_name, "image processor", hub)
        overrides = {name: options[name] for name in options if name not in {*HubOptions._fields, *_NOT_OPTIONS}}
        if not return_unused_kwargs:
            return cls.from_json_file(file, **overrides)
        used = {name: value for name, value in overrides.items() if name in OPTION_NAMES}
        return cls.from_json_file(file, **used), {name: overrides[name] for name in overrides if name not in used}

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


class BeitFeatureExtractor(BeitImageProcessor):
    """Transformers' name for `BeitImageProcessor` before 4.26."""

    def __init__(self, **options: Any) -> None:
        message = "BeitFeatureExtractor is the old name of BeitImageProcessor; use BeitImageProcessor"
        warnings.warn(message, FutureWarning, stacklevel=2)
        super().__init__(**options)


def reduce_labels(labels: Tensor) -> Tensor:
    """Subtract 1 from class ids; 0 (background) and 255 become 255, which the loss ignores."""
    return torch.where((labels == 0) | (labels == IGNORED_LABEL), IGNORED_LABEL, labels - 1)


def affine(options: Options, channels: int, was_unit_range: bool) -> tuple[list[float], list[float]] | None:
    """Return the scale and shift of each channel.

    They rescale and normalize in one step. The result is None if neither is done.

    Raises:
        ValueError: If the number of means or standard deviations is not the number of channels.
    """
    if not (options["do_rescale"] or options["do_normalize"] or was_unit_range):
        return None
    factor = (options["rescale_factor"] if options["do_rescale"] else 1.0) * (1 / 255 if was_unit_range else 1.0)
    if not options["do_normalize"]:
        return [factor] * channels, [0.0] * channels
    means, deviations = (_for_channels(name, options[name], channels) for name in ("image_mean", "image_std"))
    scale = [factor / deviation for deviation in deviations]
    return scale, [-mean / deviation for mean, deviation in zip(means, deviations, strict=True)]


def _for_channels(name: str, numbers: Any, channels: int) -> list[float]:
    if not isinstance(numbers, list):
        return [float(numbers)] * channels
    if len(numbers) != channels:
        hint = "; pass do_convert_rgb=True to convert it to RGB" if channels in (1, 4) and len(numbers) == 3 else ""
        raise ValueError(f"{name} has {len(numbers)} numbers but an image has {channels} channels{hint}")
    return numbers


def _read_and_record(images: Any, options: Options, were_rescaled: list[bool]) -> Iterator[Array]:
    """Read images one at a time; `were_rescaled` records which are rescaled twice."""
    for image in read_images(images, options["do_convert_rgb"], options["input_data_format"]):
        were_rescaled.append(options["do_rescale"] and is_unit_range(image))
        yield image


def size_pair(size: Mapping[str, int]) -> tuple[int, int]:
    return size["height"], size["width"]


def _channels_last(image: Any) -> Any:
    """Convert `[C, H, W]` to a contiguous `[H, W, C]`."""
    if isinstance(image, Tensor):
        return image.permute(1, 2, 0).contiguous()
    return np.ascontiguousarray(np.moveaxis(image, 0, -1))


def _collect(items: Sequence[Any] | Tensor, name: str, options: Options) -> Any:
    """Return a list, or stack a batch, by `return_tensors`."""
    kind = options["return_tensors"]
    if kind is None:
        return list(items)
    if not isinstance(items, Tensor) and len({tuple(item.shape) for item in items}) > 1:
        shapes = ", ".join(sorted({str(list(item.shape)) for item in items}))
        raise ValueError(
            f"{name} of the shapes {shapes} cannot be stacked: resize or crop to one size, or pass "
            "return_tensors=None for a list"
        )
    if not isinstance(items, Tensor) and isinstance(items[0], np.ndarray):
        stacked = np.stack(items)
        return stacked if kind == "np" else as_tensor(stacked, options["device"])
    batch = items if isinstance(items, Tensor) else torch.stack(list(items))
    return batch if kind == "pt" else as_array(batch)
