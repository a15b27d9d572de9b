"""Inputs of the image processors: modes, files, layouts and errors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.image_processing import BeitImageProcessor, BeitImageProcessorFast

BOTH = pytest.mark.parametrize("class_", [BeitImageProcessor, BeitImageProcessorFast])
AS_THEY_ARE = {"do_resize": False, "do_rescale": False, "do_normalize": False, "return_tensors": "np"}


@pytest.fixture(params=[BeitImageProcessor, BeitImageProcessorFast])
def processor(request):
    return request.param(**AS_THEY_ARE)


def pixels_of(processor, image, **overrides):
    """Return the pixels of one image as RGB triples by row."""
    return np.moveaxis(processor(image, **overrides).pixel_values[0], 0, -1).tolist()


def palette_image(transparent=None):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([0, 1])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def transparent_rgb():
    image = Image.new("RGB", (2, 1), (9, 8, 7))
    image.putpixel((1, 0), (1, 2, 3))
    image.info["transparency"] = (9, 8, 7)
    return image


MODES = {
    "1": (Image.new("1", (1, 1), 1), [255, 255, 255]),
    "L": (Image.new("L", (1, 1), 77), [77, 77, 77]),
    "LA": (Image.new("LA", (1, 1), (77, 0)), [255, 255, 255]),
    "La": (Image.new("LA", (1, 1), (77, 255)).convert("La"), [77, 77, 77]),
    "RGBA opaque": (Image.new("RGBA", (1, 1), (1, 2, 3, 255)), [1, 2, 3]),
    "RGBA clear": (Image.new("RGBA", (1, 1), (1, 2, 3, 0)), [255, 255, 255]),
    "RGBA half": (Image.new("RGBA", (1, 1), (0, 100, 255, 51)), [204, 224, 255]),
    "RGBa": (Image.new("RGBA", (1, 1), (0, 100, 255, 51)).convert("RGBa"), [204, 224, 255]),
    "CMYK": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [255, 0, 0]),
    "YCbCr": (Image.new("RGB", (1, 1), (80, 80, 80)).convert("YCbCr"), [80, 80, 80]),
    "HSV": (Image.new("HSV", (1, 1), (0, 255, 255)), [255, 0, 0]),
    "I": (Image.new("I", (1, 1), 65535), [255, 255, 255]),
    "I;16": (Image.fromarray(np.array([[257 * 100]], dtype=np.uint16)), [100, 100, 100]),
    "I;16B": (Image.frombytes("I;16B", (1, 1), b"\x64\x64"), [100, 100, 100]),
}


@pytest.mark.parametrize(("image", "expected"), MODES.values(), ids=MODES.keys())
def test_preprocess_converts_every_mode_to_rgb(processor, image, expected):
    assert pixels_of(processor, image) == [[expected]]


def test_preprocess_32_bit_integers_up_to_255_are_not_darkened(tmp_path, processor):
    """Regression: a 32-bit picture with values 0 to 255 became black."""
    gray = np.array([[0, 1, 100, 255]])
    Image.fromarray(gray.astype(np.int32)).save(tmp_path / "i32.tif")
    with Image.open(tmp_path / "i32.tif") as opened:
        assert opened.mode == "I"
        for image in (tmp_path / "i32.tif", opened, Image.fromarray(gray.astype(np.int32))):
            assert pixels_of(processor, image) == [[[value] * 3 for value in (0, 1, 100, 255)]]
        assert pixels_of(processor, opened) == np.asarray(opened.convert("RGB")).tolist()
    Image.fromarray(gray.astype(np.int32) * 256).save(tmp_path / "i32.tif")
    assert pixels_of(processor, tmp_path / "i32.tif") == [[[value] * 3 for value in (0, 1, 100, 254)]]


def test_preprocess_dark_16_bits_stay_dark(tmp_path, processor):
    """Pillow opens 16-bit PGM files, and some versions of it PNG files, as mode "I" too."""
    dark = np.array([[0, 100, 255]], dtype=np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    Image.fromarray(dark).save(tmp_path / "dark.tif")
    (tmp_path / "dark.pgm").write_bytes(b"P5 3 1 65535\n" + dark.astype(">u2").tobytes())
    for name in ("dark.png", "dark.tif", "dark.pgm"):
        assert pixels_of(processor, tmp_path / name) == [[[0] * 3, [0] * 3, [1] * 3]], name


def test_preprocess_converts_palettes_and_transparent_colors(processor):
    assert pixels_of(processor, palette_image()) == [[[10, 20, 30], [200, 100, 0]]]
    assert pixels_of(processor, palette_image(transparent=1)) == [[[10, 20, 30], [255, 255, 255]]]
    assert pixels_of(processor, palette_image(transparent=b"\x00\xff")) == [[[255, 255, 255], [200, 100, 0]]]
    assert pixels_of(processor, palette_image().convert("PA")) == [[[10, 20, 30], [200, 100, 0]]]
    assert pixels_of(processor, transparent_rgb()) == [[[255, 255, 255], [1, 2, 3]]]


def test_do_convert_rgb_false_keeps_the_mode(processor):
    assert processor(palette_image(), do_convert_rgb=False).pixel_values.tolist() == [[[[0, 1]]]]
    assert processor(Image.new("1", (1, 1), 1), do_convert_rgb=False).pixel_values.tolist() == [[[[255]]]]
    assert processor(Image.new("RGBA", (1, 1), (1, 2, 3, 4)), do_convert_rgb=False).pixel_values.shape == (1, 4, 1, 1)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (1, 1), 0.5), "mode 'F', .* .expected an image file of 8 or 16 bits, or an array with values"),
        (torch.zeros(2, 3, 4, 5).to_sparse(), r"image 0 has the layout torch\.sparse_coo .expected a dense tensor"),
        (torch.zeros(3, 4, 5).to_mkldnn(), r"image 0 has the layout torch\._mkldnn .expected a dense tensor"),
        (torch.zeros(2, 3, 4, 5, device="meta"), "image 0 is on the device meta, which has no values"),
        (Image.new("I", (1, 1), 70000), "integers from 70000 to 70000 .expected 0 to 65535"),
        (Image.new("RGB", (0, 5)), "image 0 has no pixels: its size is 0 x 5"),
        (np.zeros((0, 5, 3)), r"image 0 has no pixels: its shape is \[0, 5, 3\]"),
        (torch.zeros(2, 3, 0, 5), r"image 0 has no pixels: its shape is \[3, 0, 5\]"),
        (np.zeros(5), r"image 0 has the shape \[5\] \(expected"),
        (np.zeros((1, 2, 3, 4, 5)), r"image 0 has the shape \[1, 2, 3, 4, 5\] \(expected"),
        (np.zeros((5, 6, 7)), "neither end can be 1, 3 or 4 channels"),
        (np.zeros((3, 6, 3)), "both ends can be .* Pass input_data_format="),
        ([], "got no images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_preprocess_with_an_invalid_image_raises(processor, image, message):
    with pytest.raises(ValueError, match=message):
        processor(image)


@pytest.mark.parametrize("image", [None, 5, {"image": 1}, b"abc", ["x", 5][1:], np.array([["a"]])], ids=str)
def test_preprocess_with_another_type_raises(processor, image):
    with pytest.raises(TypeError, match=r"image 0 is (of type|an array of)"):
        processor(image)


@BOTH
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((5, 5, 3), 256), "values from 256 to 256"),
        (np.full((5, 5, 3), -1), "values from -1 to -1"),
        (np.full((5, 5, 3), 1.5), "values from 1.5 to 1.5"),
        (np.full((5, 5, 3), np.nan), "values from nan to nan"),
        (np.full((5, 5, 3), 40000, np.uint16), "values from 40000 to 40000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_preprocess_with_values_out_of_range_raises(class_, image, message):
    with pytest.raises(ValueError, match=message):
        class_(do_rescale=False)(image)


@BOTH
def test_preprocess_with_another_number_of_means_raises(class_):
    with pytest.raises(
        ValueError, match="image_mean has 3 numbers but an image has 1 channels; pass do_convert_rgb=True"
    ):
        class_()(np.zeros((9, 9), np.uint8))
    assert class_(image_mean=[0.5], image_std=0.5)(np.zeros((9, 9), np.uint8), return_tensors="pt").pixel_values.shape
    four = class_(image_mean=0.5, image_std=0.5)(np.zeros((9, 9, 4), np.uint8), return_tensors="pt")
    assert four.pixel_values.shape == (1, 4, 224, 224)


def test_do_convert_rgb_true_converts_arrays(processor):
    gray, clear = np.full((1, 2), 7, np.uint8), np.array([[[1, 2, 3, 0], [1, 2, 3, 255]]], np.uint8)
    assert pixels_of(processor, gray, do_convert_rgb=True) == [[[7] * 3] * 2]
    assert pixels_of(processor, torch.tensor(gray), do_convert_rgb=True) == [[[7] * 3] * 2]
    over_white = pixels_of(processor, clear, do_convert_rgb=True, input_data_format="channels_last")
    assert over_white == [[[255, 255, 255], [1, 2, 3]]]
    half = torch.tensor([0.0, 0.5, 1.0, 0.5]).view(4, 1, 1).expand(4, 2, 2)
    assert pixels_of(processor, half, do_convert_rgb=True) == [[[0.5, 0.75, 1.0]] * 2] * 2
    with pytest.raises(ValueError, match="outside"):
        processor(half * 4, do_convert_rgb=True)
    with pytest.raises(ValueError, match=r"2 channels \(do_convert_rgb supports 1, 3 or 4"):
        processor(torch.zeros(2, 9, 9), do_convert_rgb=True, input_data_format="channels_first")


@pytest.mark.parametrize(
    ("shape", "data_format", "expected"),
    [
        ((1, 1, 3), None, (3, 1, 1)),
        ((3, 1, 1), None, (3, 1, 1)),
        ((3, 5, 4), None, (3, 5, 4)),
        ((4, 5, 3), None, (3, 4, 5)),
        ((9, 5, 3), None, (3, 9, 5)),
        ((3, 6, 3), "channels_last", (3, 3, 6)),
        ((3, 6, 3), "channels_first", (3, 6, 3)),
        ((2, 8, 9), "channels_first", (2, 8, 9)),
    ],
)
def test_preprocess_infers_or_takes_the_layout(processor, shape, data_format, expected):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    for image in (array, torch.tensor(array), [array], array[None], [[array]]):
        result = processor(image, input_data_format=data_format).pixel_values
        assert result.shape == (1, *expected)
        assert sorted(result.ravel().tolist()) == sorted(array.ravel().tolist())


def test_preprocess_accepts_unusual_arrays(processor):
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    read_only = image.copy()
    read_only.flags.writeable = False
    for same in (read_only, image[::-1][::-1], image.astype(">i4"), image.astype(np.uint16), image.astype(np.float16)):
        assert pixels_of(processor, same) == image.tolist()
    assert pixels_of(processor, image[::-1, ::-1]) == image[::-1, ::-1].tolist()
    assert pixels_of(processor, image > 20) == ((image > 20) * 255).tolist()
    assert pixels_of(processor, torch.tensor(image).to(torch.bfloat16).requires_grad_()) == image.tolist()


@BOTH
def test_preprocess_does_not_modify_the_image(class_):
    for image in (np.full((4, 5, 3), 7, np.uint8), np.full((4, 5, 3), 7.0, np.float32), torch.full((3, 4, 5), 7.0)):
        before = image.copy() if isinstance(image, np.ndarray) else image.clone()
        for options in ({}, {"do_resize": False}):
            class_(**options)(image, return_tensors="pt")
        assert (image == before).all()


@BOTH
def test_preprocess_of_one_pixel(class_):
    for image in (Image.new("RGB", (1, 1), (255, 0, 51)), torch.tensor([255, 0, 51], dtype=torch.uint8).view(3, 1, 1)):
        for resample in range(6):
            values = class_(size=4, resample=resample)(image, return_tensors="pt").pixel_values
            expected = torch.tensor([1.0, -1.0, -0.6]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
            torch.testing.assert_close(values, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_preprocess_applies_the_exif_orientation(tmp_path, processor, orientation):
    stored = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a[::-1].transpose(1, 0, 2),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: a[:, ::-1].transpose(1, 0, 2),
    }
    expected = turned[orientation](np.asarray(stored)).tolist()
    assert pixels_of(processor, tmp_path / "turned.png") == expected
    assert pixels_of(processor, str(tmp_path / "turned.png")) == expected
    with Image.open(tmp_path / "turned.png") as image:
        assert pixels_of(processor, image) == expected
        assert image.size == (3, 2)


def test_preprocess_with_an_unreadable_file_raises(tmp_path, processor):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(whole)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:900])
    files = [tmp_path / "whole.jpg"]
    assert processor(files).pixel_values.shape == (1, 3, 90, 90)
    for name in ("cut.jpg", "cut.png"):
        with pytest.raises(
            OSError, match=rf"image 1 \('.*{name}'\) cannot be decoded, the file is damaged or truncated"
        ):
            processor([*files, tmp_path / name])
    for name in ("text.jpg", "empty.jpg"):
        with pytest.raises(OSError, match=rf"image 1 \('.*{name}'\) cannot be read: Pillow does not recognize"):
            processor([*files, str(tmp_path / name)])
    with pytest.raises(FileNotFoundError, match=r"image 1 \('.*absent.jpg'\) cannot be read: there is no such file"):
        processor([*files, tmp_path / "absent.jpg"])
    with pytest.raises(FileNotFoundError, match="URLs are not supported"):
        processor("https://example.com/cat.jpg")
    with (
        Image.open(io.BytesIO(whole[: len(whole) // 2])) as image,
        pytest.raises(OSError, match="image 0 cannot be decoded"),
    ):
        processor(image)


def test_preprocess_with_a_file_over_the_pixel_limit_raises(tmp_path, processor, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(
        OSError, match=r"image '.*huge.png' cannot be read: it exceeds PIL.Image.MAX_IMAGE_PIXELS.*1200"
    ):
        processor(tmp_path / "huge.png")


def test_preprocess_accepts_every_form_of_a_label_map(tmp_path, processor):
    image = np.zeros((1, 2, 3), np.uint8)
    palette_image().save(tmp_path / "map.png")
    maps = [
        palette_image(),
        tmp_path / "map.png",
        Image.fromarray(np.array([[0, 1]], np.uint8)),
        Image.fromarray(np.array([[0, 1]], np.uint16)),
        Image.fromarray(np.array([[0, 1]], np.int32)),
        np.array([[0, 1]]),
        np.array([[False, True]]),
        np.array([[0, 1]], np.uint16),
        np.array([[0.0, 1.0]]),
        np.array([[[0, 1]]]),
        torch.tensor([[0, 1]], dtype=torch.uint8),
        torch.tensor([[[0, 1]]]),
    ]
    for label_map in maps:
        assert processor(image, label_map).labels.tolist() == [[[0, 1]]]
    assert processor([image] * 2, np.array([[[0, 1]], [[2, 3]]])).labels.tolist() == [[[0, 1]], [[2, 3]]]
    assert processor(np.zeros((2, 1, 3), np.uint8), np.array([[[4]], [[5]]])).labels.tolist() == [[[4], [5]]]
    assert processor(image, np.array([[-100, 70000]])).labels.tolist() == [[[-100, 70000]]]


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (np.zeros((1, 2)) + 0.5, "not integers"),
        (Image.new("RGB", (2, 1)), r"segmentation map 0 has the shape \[1, 2, 3\] \(expected \[H, W\]"),
        (np.zeros((0, 2)), r"segmentation map 0 has no pixels: its shape is \[0, 2\]"),
        (
            torch.zeros(1, 2).to_sparse(),
            r"segmentation map 0 has the layout torch\.sparse_coo .expected a dense tensor",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_preprocess_with_an_invalid_label_map_raises(processor, label_map, message):
    with pytest.raises(ValueError, match=message):
        processor(np.zeros((1, 2, 3), np.uint8), label_map)
