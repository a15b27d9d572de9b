"""The image processor of a checkpoint: what decides, and sizes for other images."""

import json

import pytest

from beit_fast import BeitConfig
from beit_fast.image_processing import BeitImageProcessor
from beit_fast.image_processing.of_checkpoint import find_processor, fit_to_image_size
from beit_fast.image_processing.timm_options import resize_options
from beit_fast.utils.hub import HubOptions

from ..support.models import MEAN, STD

WHOLE = {"height": 224, "width": 224}
TIMM_CONFIG = {"architecture": "beit_base_patch16_224", "pretrained_cfg": {"mean": MEAN, "std": STD, "crop_pct": 0.9}}


def test_find_processor_reads_the_hub_cache(tmp_path):
    """A repository of timm has no `preprocessor_config.json`."""
    repository = tmp_path / "models--someone--timm-beit"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text(json.dumps(TIMM_CONFIG))
    hub = HubOptions(cache_dir=tmp_path, local_files_only=True)
    found = find_processor("someone/timm-beit", BeitConfig(), hub)
    assert (found.image_mean, found.image_std, found.size) == (MEAN, STD, {"shortest_edge": 248})
    assert (found.resample, found.do_center_crop, found.crop_size) == (3, True, WHOLE)
    BeitImageProcessor(size=96).save_pretrained(snapshot)
    assert find_processor("someone/timm-beit", BeitConfig(), hub).size == {"height": 96, "width": 96}


def test_find_processor_order_is_file_then_config_then_timm(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIMM_CONFIG))
    stored = BeitConfig(pixel_mean=[0.1] * 3, pixel_std=[0.2] * 3, image_size=(32, 64))
    assert find_processor(tmp_path, stored, HubOptions()).image_mean == [0.1] * 3
    assert find_processor(tmp_path, stored, HubOptions()).size == {"height": 32, "width": 64}
    BeitImageProcessor(image_mean=[0.3] * 3).save_pretrained(tmp_path)
    assert find_processor(tmp_path, stored, HubOptions()).image_mean == [0.3] * 3


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "beit_base_patch16_224"},
        {"architecture": "beit_base_patch16_224", "pretrained_cfg": {"mean": MEAN}},
        {"architecture": "beit_base_patch16_224", "pretrained_cfg": {"mean": [0.5], "std": [0.5]}},
        {"model_type": "beit", "pretrained_cfg": {"mean": MEAN, "std": STD}},
        None,
    ],
    ids=["no entries", "no deviation", "one channel", "not of timm", "no file"],
)
def test_find_processor_guesses_nothing(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_processor(tmp_path, BeitConfig(), HubOptions()) is None


def test_resize_options_missing_entries_have_the_defaults_of_timm():
    assert resize_options({}, (224, 224)) == {
        "resample": "bicubic",
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": WHOLE,
    }


def test_resize_options_of_rectangles_can_only_squash():
    squashed = resize_options({"crop_mode": "squash", "crop_pct": 0.5}, (32, 64))
    assert squashed["size"] == {"height": 64, "width": 128}
    assert (squashed["do_center_crop"], squashed["crop_size"]) == (True, {"height": 32, "width": 64})
    with pytest.raises(ValueError, match=r"crop_mode='center' with images of 32x64 \(expected square images\)"):
        resize_options({}, (32, 64))


@pytest.mark.parametrize(
    ("options", "size", "crop_size"),
    [
        ({"size": 224}, {"height": 384, "width": 512}, WHOLE),
        ({"size": {"shortest_edge": 224}}, {"shortest_edge": 512}, WHOLE),
        ({"size": {"shortest_edge": 224, "longest_edge": 448}}, {"shortest_edge": 512, "longest_edge": 1024}, WHOLE),
        ({"size": {"max_height": 224, "max_width": 320}}, {"max_height": 384, "max_width": 512}, WHOLE),
        ({"size": 256, "do_center_crop": True}, {"height": 439, "width": 585}, {"height": 384, "width": 512}),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True},
            {"shortest_edge": 585},
            {"height": 384, "width": 512},
        ),
        ({"do_resize": False}, WHOLE, WHOLE),
    ],
)
def test_fit_to_image_size_keeps_the_form_of_the_size(options, size, crop_size):
    processor = BeitImageProcessor(**options, image_mean=MEAN, note="kept")
    fitted = fit_to_image_size(processor, (384, 512))
    assert (fitted.size, fitted.crop_size) == (size, crop_size)
    assert (fitted.image_mean, fitted.other_fields) == (MEAN, {"note": "kept"})
    assert processor.to_dict() == BeitImageProcessor(**options, image_mean=MEAN, note="kept").to_dict()
