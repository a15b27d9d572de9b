"""Options, files and results of the image processors."""

import importlib
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import beit_fast
from beit_fast.image_processing import BatchFeature, BeitFeatureExtractor, BeitImageProcessor, BeitImageProcessorFast
from beit_fast.image_processing.resampling import center_crop
from beit_fast.utils import files

BOTH = pytest.mark.parametrize("class_", [BeitImageProcessor, BeitImageProcessorFast])

# A file of the 4.x series: sizes as ints, the old name of the labels' option and one key of its own.
VERSION_4_FILE = """{
  "crop_size": 224,
  "do_center_crop": false,
  "do_normalize": true,
  "do_resize": true,
  "feature_extractor_type": "BeitFeatureExtractor",
  "image_mean": [0.5, 0.5, 0.5],
  "image_std": [0.5, 0.5, 0.5],
  "note": {"by": "somebody"},
  "reduce_labels": true,
  "resample": 2,
  "size": 640
}"""


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_defaults_are_those_of_transformers_5():
    assert BeitImageProcessor().to_dict() == {
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "do_normalize": True,
        "do_reduce_labels": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "BeitImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": 224, "width": 224},
    }


def test_options_accept_every_spelling():
    pair = {"height": 96, "width": 64}
    for size in ((96, 64), [96, 64], pair, {**pair, "shortest_edge": None}, np.array([96, 64]).tolist()):
        assert BeitImageProcessor(size=size, crop_size=size).crop_size == pair
    assert BeitImageProcessor(size=np.int64(96)).size == {"height": 96, "width": 96}
    assert BeitImageProcessor(size=96, default_to_square=False).size == {"shortest_edge": 96}
    for resample in (1, "lanczos", "LANCZOS", Image.Resampling.LANCZOS):
        assert BeitImageProcessor(resample=resample).to_dict()["resample"] == 1
    assert BeitImageProcessor(image_mean=np.array([0.1, 0.2, 0.3])).image_mean == [0.1, 0.2, 0.3]
    assert BeitImageProcessor(reduce_labels=True).do_reduce_labels is True
    assert BeitImageProcessor(do_resize=None).do_resize is True


def test_construction_lists_every_invalid_option_in_one_error():
    with pytest.raises(ValueError, match="BeitImageProcessor has 6 errors") as caught:
        BeitImageProcessor(
            size={"height": 5}, crop_size=0, resample="cubic", image_std=[1, 0, 1], return_tensors="tf", do_resize=1
        )
    for name in ("size=", "crop_size=", "resample='cubic'", "image_std=", "return_tensors='tf'", "do_resize=1"):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="a longest_edge at least as long"):
        BeitImageProcessor(size={"shortest_edge": 9, "longest_edge": 5})
    with pytest.raises(ValueError, match="contradict each other"):
        BeitImageProcessor(reduce_labels=True, do_reduce_labels=False)
    with pytest.raises(TypeError, match=r"no option do_center_crp \(expected do_resize"):
        BeitImageProcessor()(noise(9, 9, 3), do_center_crp=True)
    with pytest.raises(ValueError, match="requires return_tensors='pt'"):
        BeitImageProcessor()(noise(9, 9, 3), input_data_format="channels_last", device="cpu")


@BOTH
def test_preprocess_overrides_apply_to_one_call(class_):
    processor = class_(size=32)
    image = noise(20, 30, 3)
    before = processor.to_dict()
    small = processor(image, size=8, do_normalize=False, return_tensors="pt").pixel_values
    assert small.shape == (1, 3, 8, 8)
    assert small.min() >= 0
    assert small.max() <= 1
    assert processor.preprocess(image, size=None, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert processor.to_dict() == before
    processor.size = 16
    processor.do_center_crop, processor.crop_size = True, {"height": 4, "width": 6}
    assert processor(image, return_tensors="np").pixel_values.shape == (1, 3, 4, 6)


@BOTH
def test_preprocess_returns_lists_arrays_or_tensors(class_):
    images = [noise(20, 30, 3), noise(31, 17, 3)]
    features = class_(size=8)(images, return_tensors="pt")
    assert isinstance(features, BatchFeature)
    assert isinstance(features, dict)
    assert features.pixel_values is features["pixel_values"]
    assert list(features) == ["pixel_values"]
    assert features.pixel_values.is_contiguous()
    last = class_(size=8)(images, return_tensors="np", data_format="channels_last").pixel_values
    assert np.array_equal(np.moveaxis(last, -1, 1), features.pixel_values.numpy())
    listed = class_(size={"shortest_edge": 8})(images).pixel_values
    assert [tuple(image.shape) for image in listed] == [(3, 8, 12), (3, 14, 8)]
    assert all(isinstance(image, torch.Tensor if class_ is BeitImageProcessorFast else np.ndarray) for image in listed)
    with pytest.raises(ValueError, match=r"shapes \[3, 14, 8\], \[3, 8, 12\] cannot be stacked"):
        class_(size={"shortest_edge": 8})(images, return_tensors="pt")


def test_batch_feature_to_moves_and_converts():
    features = BatchFeature(pixel_values=torch.ones(2), labels=[torch.ones(2).long()], names=["a"])
    assert features.to(torch.float16) is features
    assert features.pixel_values.dtype == torch.float16
    assert features.labels[0].dtype == torch.int64
    features.to("meta", dtype=torch.float64)
    assert features.pixel_values.is_meta
    assert features.labels[0].is_meta
    assert features.labels[0].dtype == torch.int64
    assert features.names == ["a"]
    with pytest.raises(AttributeError, match="not 'logits'"):
        features.logits  # noqa: B018
    assert pickle.loads(pickle.dumps(BatchFeature(a=1))).a == 1


@BOTH
def test_preprocess_keeps_class_ids(class_):
    """Regression: bicubic resizing in Transformers turned ids 0 to 150 into labels up to 168."""
    labels = np.random.default_rng(0).integers(0, 151, (50, 70)).astype(np.uint8)
    image = noise(50, 70, 3)
    result = class_(resample=3)(image, labels, return_tensors="pt")
    assert set(result.labels.unique().tolist()) <= set(np.unique(labels).tolist())
    assert result.labels.shape == (1, 224, 224)
    assert result.labels.dtype == torch.int64


@BOTH
def test_do_reduce_labels_does_not_modify_the_array(class_):
    """Regressions of huggingface/transformers#38042 and #43527."""
    first = np.array([[0, 1], [254, 255]], dtype=np.uint8)
    second = np.array([[150, 2], [0, 0]], dtype=np.int64)
    kept = first.copy(), second.copy()
    images = [noise(2, 2, 3), noise(2, 2, 3) // 200]
    reduced = class_(size=2, do_reduce_labels=True)(
        images, [first, second], input_data_format="channels_last", return_tensors="pt"
    )
    assert reduced.labels.tolist() == [[[255, 0], [253, 255]], [[149, 1], [255, 255]]]
    assert np.array_equal(first, kept[0])
    assert np.array_equal(second, kept[1])
    plain = class_(size=2)(images, [first, second], input_data_format="channels_last", return_tensors="pt")
    assert torch.equal(plain.pixel_values, reduced.pixel_values)
    assert plain.labels.tolist() == [first.tolist(), second.tolist()]
    tensor = torch.tensor(second)
    class_(do_resize=False, do_reduce_labels=True)(images[0], tensor, input_data_format="channels_last")
    assert torch.equal(tensor, torch.tensor(second))


@BOTH
def test_center_crop_beyond_the_image_pads_with_zeros_and_ignored_labels(class_):
    options = {"do_resize": False, "do_center_crop": True, "crop_size": (5, 2), "do_normalize": False}
    result = class_(**options, do_reduce_labels=True)(
        np.full((2, 4, 3), 255, np.uint8), np.full((2, 4), 7), return_tensors="np"
    )
    assert result.labels[0].tolist() == [[255, 255], [255, 255], [6, 6], [6, 6], [255, 255]]
    assert result.pixel_values[0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("size", [(3, 3), (4, 3), (7, 9), (1, 8), (6, 5)])
def test_center_crop_of_tensors_and_arrays_agree(size):
    image = noise(3, 6, 5)
    cropped = center_crop(image, size, fill=9)
    assert np.array_equal(center_crop(torch.tensor(image), size, fill=9).numpy(), cropped)
    assert cropped.shape == (3, *size)


@BOTH
def test_preprocess_with_another_number_of_label_maps_raises(class_):
    with pytest.raises(ValueError, match="expected 2 segmentation maps for 2 images, got 1"):
        class_()([noise(9, 9, 3)] * 2, [noise(9, 9)])


def test_preprocess_of_unit_floats_warns_about_rescaling():
    image = np.random.default_rng(0).random((9, 9, 3))
    with pytest.warns(UserWarning, match="pass do_rescale=False"):
        BeitImageProcessor()(image)
    with pytest.warns(UserWarning, match="pass do_rescale=False"):
        BeitImageProcessorFast()(torch.tensor(image))


@BOTH
def test_from_pretrained_reads_a_transformers_4_file(tmp_path, class_):
    (tmp_path / "preprocessor_config.json").write_text(VERSION_4_FILE)
    processor = class_.from_pretrained(tmp_path, do_center_crop=True)
    assert processor.size == {"height": 640, "width": 640}
    assert processor.crop_size == {"height": 224, "width": 224}
    assert (processor.do_reduce_labels, processor.do_center_crop, processor.resample) == (True, True, 2)
    assert processor.other_fields == {"note": {"by": "somebody"}}
    written = json.loads(Path(processor.save_pretrained(tmp_path / "new" / "folder")[0]).read_text())
    assert written["note"] == {"by": "somebody"}
    assert written["do_reduce_labels"] is True
    assert written["image_processor_type"] == class_.__name__
    assert not {"reduce_labels", "feature_extractor_type"} & set(written)
    again = class_.from_pretrained(tmp_path / "new" / "folder" / "preprocessor_config.json")
    assert again.to_dict() == processor.to_dict()


def test_from_dict_with_both_names_of_reduce_labels_reduces_labels():
    values = {"reduce_labels": True, "do_reduce_labels": False}
    assert BeitImageProcessor.from_dict(values).do_reduce_labels is True
    assert BeitImageProcessor.from_dict({"reduce_labels": False}).do_reduce_labels is False
    assert BeitImageProcessor.from_dict({"reduce_labels": False, "do_reduce_labels": True}).do_reduce_labels is True
    assert BeitImageProcessor.from_dict(values, do_reduce_labels=False).do_reduce_labels is False
    assert BeitImageProcessor.from_dict({"do_reduce_labels": False}, reduce_labels=True).do_reduce_labels is True


@pytest.mark.parametrize("flag", ["do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_reduce_labels"])
def test_from_pretrained_null_turns_a_step_off(tmp_path, flag):
    """Regression: null meant the default, so other pixels than in Transformers."""
    options = {"do_center_crop": True, "do_reduce_labels": True, "size": 8, "crop_size": 4, flag: None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    found = BeitImageProcessor.from_pretrained(tmp_path)
    assert getattr(found, flag) is False
    others = {"do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_reduce_labels"} - {flag}
    assert all(getattr(found, name) for name in others)
    assert getattr(BeitImageProcessor.from_pretrained(tmp_path, **{flag: True}), flag) is True
    assert BeitImageProcessor.from_pretrained(tmp_path, **{flag: None}).to_dict() == found.to_dict()


def test_from_dict_null_selects_the_shortest_edge_or_the_default():
    """As in Transformers; other options that are null have their defaults, as in files of Transformers 4."""
    assert BeitImageProcessor.from_dict({"size": 8, "default_to_square": None}).size == {"shortest_edge": 8}
    others = dict.fromkeys(["crop_size", "do_convert_rgb", "data_format", "input_data_format", "device", "image_mean"])
    assert BeitImageProcessor.from_dict(others).to_dict() == BeitImageProcessor().to_dict()
    assert BeitImageProcessor.from_dict({"reduce_labels": True, "do_reduce_labels": None}).do_reduce_labels is True


@BOTH
def test_subclass_writes_a_type_that_it_and_transformers_can_read(tmp_path, class_):
    class Mine(class_):
        pass

    file = Mine(size=32).save_pretrained(tmp_path)[0]
    assert json.loads(Path(file).read_text())["image_processor_type"] == class_.__name__
    assert Mine.from_pretrained(tmp_path).to_dict() == class_(size=32).to_dict()


@BOTH
def test_from_pretrained_reads_the_hub_cache_without_a_network(tmp_path, class_):
    repository = tmp_path / "models--someone--beit-tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    BeitImageProcessor(size=96).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    found = class_.from_pretrained("someone/beit-tiny", cache_dir=tmp_path, local_files_only=True, resample=2)
    assert found.to_dict() == class_(size=96, resample=2).to_dict()
    with pytest.raises(FileNotFoundError, match=r"(?s)'someone/other'.*preprocessor_config\.json.*local_files_only"):
        class_.from_pretrained("someone/other", cache_dir=tmp_path, local_files_only=True)


def test_from_pretrained_with_other_files_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder does not contain preprocessor_config\.json"):
        BeitImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        BeitImageProcessor.from_pretrained(tmp_path / "absent")
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        BeitImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="options of DPTImageProcessor are not supported"):
        BeitImageProcessor.from_dict({"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True})
    with pytest.raises(TypeError, match=r"cannot be written: JSON cannot represent thing="):
        BeitImageProcessor(thing=object()).save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == "{"


def test_save_pretrained_with_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    BeitImageProcessor(size=32).save_pretrained(tmp_path)

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        BeitImageProcessor(size=64).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert BeitImageProcessor.from_pretrained(tmp_path).size == {"height": 32, "width": 32}


def test_feature_extractor_construction_warns(tmp_path):
    with pytest.warns(FutureWarning, match="old name of BeitImageProcessor"):
        extractor = BeitFeatureExtractor(size=32)
    assert isinstance(extractor, BeitImageProcessor)
    extractor.save_pretrained(tmp_path)
    assert BeitImageProcessor.from_pretrained(tmp_path).to_dict() == BeitImageProcessor(size=32).to_dict()


@BOTH
def test_pickle_copies_a_processor(class_):
    processor = class_(size=32, note="kept")
    assert pickle.loads(pickle.dumps(processor)).to_dict() == processor.to_dict()
    assert "BeitImageProcessor" in repr(processor)
    assert '"note": "kept"' in repr(processor)


def test_import_and_construction_do_not_import_pillow(monkeypatch):
    monkeypatch.setattr(beit_fast, "image_processing", beit_fast.image_processing)
    for name in [name for name in sys.modules if name.startswith("beit_fast.image_processing")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("PIL", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    module = importlib.import_module("beit_fast.image_processing")
    assert module.BeitImageProcessorFast is not BeitImageProcessorFast
    module.BeitImageProcessorFast()
