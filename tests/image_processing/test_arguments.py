"""Keywords of the image processors: typos, and arguments of Transformers' `from_pretrained`."""

import json
import warnings

import pytest

from beit_fast.configuration import BeitConfig
from beit_fast.image_processing import BeitImageProcessor, BeitImageProcessorFast
from beit_fast.image_processing.of_checkpoint import find_processor
from beit_fast.utils.hub import HubOptions

BOTH = pytest.mark.parametrize("class_", [BeitImageProcessor, BeitImageProcessorFast])
WITHOUT_EFFECT = {
    "proxies": {"https": "nowhere"},
    "trust_remote_code": True,
    "code_revision": "main",
    "use_fast": True,
    "backend": "pil",
    "_from_auto": True,
    "_from_pipeline": "image-classification",
    "_commit_hash": "a" * 40,
    "user_agent": {"using": "this"},
}


@BOTH
@pytest.mark.parametrize(
    ("typo", "option"),
    [
        ("image_men", "image_mean"),
        ("do_resise", "do_resize"),
        ("cropsize", "crop_size"),
        ("reduce_label", "reduce_labels"),
        ("mean", "image_mean"),
        ("std", "image_std"),
        ("interpolation", "resample"),
        ("input_size", "size"),
        ("crop_pct", "size' or 'crop_size"),
        ("crop_mode", "do_center_crop"),
    ],
)
def test_construction_with_a_typo_or_a_name_of_timm_warns_and_names_the_option(class_, typo, option):
    """Regression: `image_men` and `mean` were kept without a word, and images were normalized with 0.5."""
    text = rf"{typo}=0\.5 is not an option of {class_.__name__} and has no effect \(did you mean '{option}'\?\)"
    with pytest.warns(UserWarning, match=text) as caught:
        processor = class_(**{typo: 0.5})
    assert [warning.filename for warning in caught] == [__file__]
    assert processor.other_fields == {typo: 0.5}


@BOTH
def test_file_with_a_typo_warns(tmp_path, class_):
    (tmp_path / "preprocessor_config.json").write_text('{"image_sdt": [1, 1, 1]}')
    with pytest.warns(UserWarning, match="did you mean 'image_std'"):
        class_.from_pretrained(tmp_path)


@BOTH
def test_construction_with_fields_of_other_files_does_not_warn(class_):
    fields = ("processor_class", "do_pad", "pad_size", "size_divisor", "do_flip_channel_order", "num_classes", "note")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(class_(**dict.fromkeys(fields, 1)).other_fields) == set(fields)


def test_preprocess_with_a_typo_names_the_option():
    with pytest.raises(TypeError, match=r"no option do_center_crp \(expected .*\) \(did you mean 'do_center_crop'\?\)"):
        BeitImageProcessor()([], do_center_crp=True)
    with pytest.raises(TypeError, match=r"\(mean: did you mean 'image_mean'\?; std: did you mean 'image_std'\?\)$"):
        BeitImageProcessor()([], mean=0.5, std=0.5, note=1)


@BOTH
def test_from_pretrained_with_a_subfolder_reads_its_file(tmp_path, class_):
    """Regression: the file of the folder itself was read, and `subfolder` was written as a field."""
    class_(size=12).save_pretrained(tmp_path)
    class_(size=6).save_pretrained(tmp_path / "inner" / "small")
    found = class_.from_pretrained(tmp_path, subfolder="inner/small")
    assert found.to_dict() == class_(size=6).to_dict()
    assert find_processor(tmp_path, BeitConfig(), HubOptions(subfolder="inner/small")).size == {"height": 6, "width": 6}
    with pytest.raises(FileNotFoundError, match=r"does not contain the subfolder 'other'"):
        class_.from_pretrained(tmp_path, subfolder="other")


@BOTH
def test_from_pretrained_with_a_subfolder_of_a_cached_repository(tmp_path, class_):
    repository = tmp_path / "models--someone--beit-tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    class_(size=12).save_pretrained(snapshot)
    class_(size=6).save_pretrained(snapshot / "small")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    assert class_.from_pretrained("someone/beit-tiny", subfolder="small", **hub).size == {"height": 6, "width": 6}
    assert find_processor("someone/beit-tiny", BeitConfig(), HubOptions(**hub, subfolder="small")).size["width"] == 6


@BOTH
def test_from_pretrained_accepts_the_arguments_of_transformers(tmp_path, class_):
    """Regression: they became fields of the processor and were saved."""
    class_(size=12, note="kept").save_pretrained(tmp_path)
    hub = {"force_download": True, "revision": "main", "token": "t", "cache_dir": tmp_path, "local_files_only": False}
    found = class_.from_pretrained(tmp_path, **hub, **WITHOUT_EFFECT, resample=2)
    assert found.other_fields == {"note": "kept"}
    assert found.to_dict() == class_(size=12, note="kept", resample=2).to_dict()


def test_from_pretrained_with_another_file_name(tmp_path):
    BeitImageProcessor(size=12).save_pretrained(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps(BeitImageProcessor(size=6).to_dict()))
    found = BeitImageProcessor.from_pretrained(tmp_path, image_processor_filename="other.json")
    assert found.to_dict() == BeitImageProcessor(size=6).to_dict()


@BOTH
def test_from_pretrained_returns_unused_arguments(tmp_path, class_):
    class_(size=12).save_pretrained(tmp_path)
    found, unused = class_.from_pretrained(
        tmp_path, return_unused_kwargs=True, resample=2, reduce_labels=True, tail=1, force_download=True
    )
    assert unused == {"tail": 1}
    assert found.to_dict() == class_(size=12, resample=2, do_reduce_labels=True).to_dict()
