"""Pixel values and sizes compared with the Pillow backend of Transformers."""

import itertools
import json

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil

from beit_fast.image_processing import BeitImageProcessor, BeitImageProcessorFast
from beit_fast.image_processing.resampling import resize_by_matrices

LEVEL = 1 / 255
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
GEOMETRIES = {
    "default": {},
    "enlarge": {"size": {"height": 640, "width": 640}},
    "rectangle": {"size": (333, 97)},
    "tall": {"size": {"height": 150, "width": 610}},
    "shortest": {"size": {"shortest_edge": 100}},
    "shortest and longest": {"size": {"shortest_edge": 100, "longest_edge": 110}},
    "longest not reached": {"size": {"shortest_edge": 100, "longest_edge": 4000}},
    "within": {"size": {"max_height": 333, "max_width": 300}},
    "crop": {"size": 256, "do_center_crop": True, "crop_size": 224},
    "odd crop": {"size": 256, "do_center_crop": True, "crop_size": (201, 151)},
    "crop beyond": {"size": 64, "do_center_crop": True, "crop_size": (101, 33)},
    "no resize": {"do_resize": False, "do_center_crop": True, "crop_size": (63, 35)},
}


@pytest.fixture(scope="module")
def images():
    photograph = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (97, 131, 3), dtype=np.uint8)
    clipped = (generator.integers(0, 2, (301, 40, 3)) * 255).astype(np.uint8)  # filters overshoot everywhere
    return {"photograph": photograph, "noise": noise, "clipped": clipped}


def unnormalize(values):
    """Invert the normalization with mean and standard deviation 0.5."""
    return np.asarray(values) / 2 + 0.5


CASES = [
    *itertools.product(["clipped"], GEOMETRIES, FILTERS),
    *itertools.product(["photograph"], GEOMETRIES, ["bicubic"]),
]


@pytest.mark.parametrize(("name", "geometry", "resample"), CASES)
def test_preprocess_returns_the_pixels_of_the_pillow_backend(images, name, geometry, resample):
    options = {**GEOMETRIES[geometry], "resample": FILTERS[resample]}
    expected = BeitImageProcessorPil(**options)(images[name], return_tensors="np")["pixel_values"]
    pixels = BeitImageProcessor(**options)(images[name], return_tensors="np").pixel_values
    fast = BeitImageProcessorFast(**options)(images[name], return_tensors="np").pixel_values
    assert pixels.shape == fast.shape == expected.shape
    assert pixels.dtype == fast.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, atol=1e-5, rtol=0)
    assert np.abs(unnormalize(fast) - unnormalize(expected)).max() <= 2.01 * LEVEL


@pytest.mark.parametrize("size", [(224, 224), (333, 50), (50, 333), (97, 20), (20, 131)], ids=str)
@pytest.mark.parametrize("resample", [1, 2, 3, 4, 5])
def test_resize_by_matrices_matches_pillow(images, resample, size):
    for image in (images["noise"], images["clipped"]):
        expected = np.array(Image.fromarray(image).resize(size[::-1], resample))
        resized = resize_by_matrices(torch.tensor(image).permute(2, 0, 1)[None], size, resample)
        difference = resized[0].permute(1, 2, 0).numpy().astype(int) - expected
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": [1.0, 2.0, 3.0]},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ],
    ids=str,
)
def test_rescaling_and_normalizing_matches_the_pillow_backend(images, options):
    expected = BeitImageProcessorPil(resample=0, **options)(images["noise"], return_tensors="np")["pixel_values"]
    for class_ in (BeitImageProcessor, BeitImageProcessorFast):
        pixels = class_(resample="nearest", **options)(images["noise"], return_tensors="np").pixel_values
        assert pixels.dtype == expected.dtype
        np.testing.assert_allclose(pixels, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["unit floats", "whole floats", "half", "int64", "channels last", "torch"])
def test_preprocess_of_every_kind_of_array_returns_the_same_pixels(images, kind):
    image = np.moveaxis(images["noise"], -1, 0)
    options = {"do_rescale": False} if kind in ("unit floats", "half") else {}
    given = {
        "unit floats": image.astype(np.float32) / 255,
        "whole floats": image.astype(np.float64),
        "half": torch.tensor(image, dtype=torch.float32).div(255).half(),
        "int64": image.astype(np.int64),
        "channels last": np.ascontiguousarray(images["noise"])[::-1][::-1],
        "torch": torch.tensor(image),
    }[kind]
    expected = BeitImageProcessor()(Image.fromarray(images["noise"]), return_tensors="pt").pixel_values
    for class_, levels in ((BeitImageProcessor, 0), (BeitImageProcessorFast, 2)):
        pixels = class_(**options)(given, return_tensors="pt").pixel_values
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels, expected, atol=1e-5 + 2 * levels * LEVEL, rtol=0)


def test_preprocess_of_unit_floats_is_close_to_the_pillow_backend(images):
    image = images["noise"].astype(np.float32) / 255
    expected = BeitImageProcessorPil(do_rescale=False)(image, return_tensors="np")["pixel_values"]
    pixels = BeitImageProcessor(do_rescale=False)(image, return_tensors="np").pixel_values
    assert np.abs(unnormalize(pixels) - unnormalize(expected)).max() <= LEVEL * 1.001


def test_preprocess_of_a_batch_and_a_list_agree(images):
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(256, (4, 3, 90, 70), generator=generator, dtype=torch.uint8)
    large = torch.randint(256, (2, 3, 300, 250), generator=generator, dtype=torch.uint8)
    mixed = [small[0], large[0], small[1], large[1], small[2], small[3]]
    processor = BeitImageProcessorFast()
    alone = [processor(image, return_tensors="pt").pixel_values[0] for image in mixed]
    for disable_grouping in (None, True, False):
        together = processor(mixed, return_tensors="pt", disable_grouping=disable_grouping).pixel_values
        assert torch.equal(together, torch.stack(alone))
    batch = processor(small, return_tensors="pt").pixel_values
    assert torch.equal(batch, together[[0, 2, 4, 5]])


@pytest.mark.parametrize("size", [7, 50, 224])
def test_preprocess_resizes_label_maps_as_pillow(size):
    labels = np.random.default_rng(0).integers(0, 151, (133, 600)).astype(np.uint8)
    expected = np.array(Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST))
    image = Image.new("RGB", (600, 133))
    for class_ in (BeitImageProcessor, BeitImageProcessorFast):
        result = class_(size=size)(image, labels, return_tensors="np").labels
        assert result.dtype == np.int64
        assert np.array_equal(result[0], expected)


def test_post_process_semantic_segmentation_matches_transformers():
    class Outputs:
        logits = torch.randn(2, 5, 9, 11)

    for sizes in (None, [(33, 20), (4, 50)], torch.tensor([[33, 20], [4, 50]])):
        pairs = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        expected = BeitImageProcessorPil().post_process_semantic_segmentation(Outputs, pairs)
        maps = BeitImageProcessor().post_process_semantic_segmentation(Outputs, sizes)
        assert all(map(torch.equal, maps, expected))
        assert maps[0].dtype == torch.int64
    scored = BeitImageProcessor().post_process_semantic_segmentation(Outputs, sizes, return_segmentation_scores=True)
    assert torch.equal(scored[1].segmentation, maps[1])
    assert scored[1].segmentation_scores.shape == (5, 4, 50)
    with pytest.raises(ValueError, match="expected 2 target_sizes for 2 images, got 1"):
        BeitImageProcessor().post_process_semantic_segmentation(Outputs, [(3, 3)])


@pytest.mark.parametrize("class_", [BeitImageProcessor, BeitImageProcessorFast])
def test_saved_processors_load_in_transformers_and_back(tmp_path, class_):
    options = {"size": (96, 64), "resample": 2, "do_center_crop": True, "crop_size": 48, "do_reduce_labels": True}
    class_(**options).save_pretrained(tmp_path / "ours")
    theirs = BeitImageProcessorPil.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert class_.from_pretrained(tmp_path / "theirs").to_dict() == class_(**options).to_dict()
    image = Image.effect_mandelbrot((120, 100), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    expected = theirs(image, return_tensors="np")["pixel_values"]
    pixels = class_.from_pretrained(tmp_path / "theirs")(image, return_tensors="np").pixel_values
    assert np.abs(unnormalize(pixels) - unnormalize(expected)).max() <= 2.01 * LEVEL


@pytest.mark.parametrize("flag", ["do_resize", "do_rescale", "do_normalize", "do_center_crop"])
def test_file_with_a_null_step_gives_the_pixels_of_the_pillow_backend(tmp_path, images, flag):
    """Regression: null turned the step on here, and off in Transformers."""
    options = {"size": 64, "do_center_crop": True, "crop_size": {"height": 48, "width": 48}, flag: None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    expected = BeitImageProcessorPil.from_pretrained(tmp_path)(images["noise"], return_tensors="np")["pixel_values"]
    for class_ in (BeitImageProcessor, BeitImageProcessorFast):
        pixels = class_.from_pretrained(tmp_path)(images["noise"], return_tensors="np").pixel_values
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).max() <= 2 * (1 if flag == "do_rescale" else 2 * LEVEL)


@pytest.mark.parametrize("class_", [BeitImageProcessor, BeitImageProcessorFast])
def test_auto_image_processor_reads_the_written_file(tmp_path, class_):
    class Mine(class_):
        pass

    Mine(size=32, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    found = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(found).__name__.startswith("BeitImageProcessor")
    assert list(found.image_mean) == [0.1, 0.2, 0.3]
    assert found.size["height"] == found.size["width"] == 32
