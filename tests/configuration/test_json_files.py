"""Configuration files, exchanged with Transformers 4 and 5."""

import json
import os

import pytest
import torch
import transformers

from beit_fast import BeitModel
from beit_fast.configuration import BeitConfig

# A file of the 4.x series: string keys, old names, no stage_names, keys that 5.x dropped and a user's own.
VERSION_4_FILE = """{
  "_name_or_path": "somebody/beit-base-ade",
  "_attn_implementation_autoset": true,
  "add_fpn": false,
  "architectures": ["BeitForSemanticSegmentation"],
  "attention_probs_dropout_prob": 0.0,
  "auxiliary_channels": 256,
  "auxiliary_concat_input": false,
  "auxiliary_loss_weight": 0.4,
  "auxiliary_num_convs": 1,
  "drop_path_rate": 0.1,
  "hidden_act": "gelu",
  "hidden_dropout_prob": 0.0,
  "hidden_size": 768,
  "id2label": {"0": "wall", "1": "building", "2": "sky"},
  "image_size": 640,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "label2id": {"building": 1, "sky": 2, "wall": 0},
  "layer_norm_eps": 1e-12,
  "layer_scale_init_value": 0.1,
  "max_length": 20,
  "model_type": "beit",
  "num_attention_heads": 12,
  "num_channels": 3,
  "num_hidden_layers": 12,
  "pool_scales": [1, 2, 3, 6],
  "reshape_hidden_states": true,
  "segmentation_indices": [3, 5, 7, 11],
  "semantic_loss_ignore_index": 255,
  "torch_dtype": "float16",
  "torchscript": false,
  "training_run": {"seed": 1, "notes": ["a", null]},
  "transformers_version": "4.57.6",
  "use_absolute_position_embeddings": false,
  "use_auxiliary_head": true,
  "use_mask_token": false,
  "use_mean_pooling": true,
  "use_relative_position_bias": true,
  "use_shared_relative_position_bias": false,
  "vocab_size": 8192
}"""
VERSION_4_ONLY = {"_attn_implementation_autoset", "max_length", "torchscript", "training_run"}

CONFIGURATIONS = {
    "default": {},
    "ints for floats": {"layer_scale_init_value": 0, "initializer_range": 0, "auxiliary_loss_weight": 1},
    "rectangle": {"image_size": (384, 512), "patch_size": (16, 16), "use_relative_position_bias": True},
    "labels": {"id2label": {0: "cat", 1: "dog", 2: "cat"}, "problem_type": "multi_label_classification"},
    "no labels": {"num_labels": 0},
    "backbone": {"out_indices": [3, 5, 7, -1], "add_fpn": True, "reshape_hidden_states": False},
    "heads": {"hidden_size": 100, "num_attention_heads": 3, "head_dim": 32},
    "precision": {"dtype": torch.bfloat16, "architectures": ["BeitModel"], "output_attentions": True},
    "unknown": {"note": {"list": [1, None, "x"], "float": 0.5}, "num_patches": 7, "_private": True},
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def fields(request):
    return request.param


def theirs_of(fields):
    """The same configuration in Transformers, which requires an int patch size and floats."""
    floats = ("layer_scale_init_value", "initializer_range", "auxiliary_loss_weight")
    converted = {name: float(value) for name, value in fields.items() if name in floats}
    return transformers.BeitConfig(**{**fields, **converted, "patch_size": 16})


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("use_diff", [True, False])
def test_to_json_file_then_from_json_file_is_equal(fields, use_diff, tmp_path):
    config = BeitConfig(**fields)
    config.to_json_file(tmp_path / "config.json", use_diff=use_diff)
    assert BeitConfig.from_json_file(tmp_path / "config.json") == config


@pytest.mark.parametrize("use_diff", [True, False])
def test_to_json_file_loads_in_transformers(fields, use_diff, tmp_path):
    config = BeitConfig(**fields)
    config.to_json_file(tmp_path / "config.json", use_diff=use_diff)
    theirs = transformers.BeitConfig.from_pretrained(tmp_path)
    names = ("transformers_version", "_name_or_path")
    assert without(theirs.to_dict(), *names) == without(config.to_dict(), *names)


def test_from_pretrained_reads_a_transformers_file(fields, tmp_path):
    theirs = theirs_of(fields)
    theirs.save_pretrained(tmp_path)
    config = BeitConfig.from_pretrained(tmp_path)
    # Transformers leaves label2id as it was when only id2label is given; here it follows.
    names = ("_name_or_path", "label2id")
    assert without(config.to_dict(), *names) == without(theirs.to_dict(), *names)
    assert config == BeitConfig(**fields, transformers_version=transformers.__version__)


def test_to_diff_dict_has_the_keys_of_transformers(fields, tmp_path):
    names = ("transformers_version", "label2id")
    ours = BeitConfig(**fields).to_diff_dict()
    theirs = theirs_of(fields).to_diff_dict()
    assert set(without(ours, *names)) == set(without(theirs, *names))


def test_from_pretrained_reads_a_transformers_4_file(tmp_path):
    (tmp_path / "config.json").write_text(VERSION_4_FILE)
    config = BeitConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "wall", 1: "building", 2: "sky"}
    assert config.label2id == {"wall": 0, "building": 1, "sky": 2}
    assert config.out_features == ["stage3", "stage5", "stage7", "stage11"]
    assert config.dtype is torch.float16
    assert (config.window, config.transformers_version) == ((40, 40), "4.57.6")
    assert config.training_run == {"seed": 1, "notes": ["a", None]}
    saved, written = json.loads(VERSION_4_FILE), config.to_diff_dict()
    assert {name: written[name] for name in VERSION_4_ONLY} == {name: saved[name] for name in VERSION_4_ONLY}
    config.save_pretrained(tmp_path)
    assert BeitConfig.from_pretrained(tmp_path) == config
    theirs = transformers.BeitConfig.from_pretrained(tmp_path)
    assert (theirs.out_indices, theirs.dtype, theirs.id2label) == (
        [3, 5, 7, 11],
        torch.float16,
        config.id2label,
    )


def test_to_json_string_omits_implementations():
    text = BeitConfig(attn_implementation="triton", patch_embed_implementation="fused").to_json_string(use_diff=False)
    for word in ("triton", "attn", "fused", "patch_embed"):
        assert word not in text


def test_from_dict_keeps_an_unknown_key_with_the_name_of_a_property():
    config = BeitConfig.from_dict({"window": 7, "image_size": 32})
    assert config.window == (2, 2)
    assert config.to_dict()["window"] == 7


def test_from_dict_overrides_replace_derived_fields():
    saved = BeitConfig(id2label={0: "cat", 1: "dog", 2: "eel"}, dtype="float16").to_dict()
    assert BeitConfig.from_dict(saved, num_labels=3).id2label[0] == "cat"
    assert BeitConfig.from_dict(saved, num_labels=4).label2id["LABEL_3"] == 3
    assert BeitConfig.from_dict(saved, label2id={"ant": 0}).id2label == {0: "ant"}
    assert BeitConfig.from_dict(saved, torch_dtype="bfloat16").dtype is torch.bfloat16
    assert BeitConfig.from_dict(saved, num_hidden_layers=6).out_features == ["stage6"]
    assert BeitConfig.from_dict(saved, out_indices=[3]).out_features == ["stage3"]
    chosen = BeitConfig(out_features=["stage3"]).to_dict()
    assert BeitConfig.from_dict(chosen, num_hidden_layers=6).out_features == ["stage3"]
    with pytest.raises(ValueError, match="out_indices"):
        BeitConfig.from_dict(chosen, num_hidden_layers=2)


def test_from_dict_does_not_modify_its_argument():
    saved = BeitConfig(note=[1]).to_dict()
    before = json.dumps(saved)
    config = BeitConfig.from_dict(saved, num_labels=4, num_hidden_layers=3)
    config.to_dict()["note"].append(2)
    assert json.dumps(saved) == before
    assert config.note == [1]


def test_from_dict_rebuilds_a_stale_label2id():
    """Transformers keeps the default label2id if only id2label is set."""
    theirs = transformers.BeitConfig()
    theirs.id2label = {0: "cat", 1: "dog", 2: "eel"}
    config = BeitConfig.from_dict(theirs.to_dict())
    assert config.label2id == {"cat": 0, "dog": 1, "eel": 2}


def test_save_pretrained_interrupted_keeps_the_old_file(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    BeitConfig().save_pretrained(folder)
    before = (folder / "config.json").read_bytes()

    def interrupted(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            BeitConfig(hidden_size=96).save_pretrained(folder)
    assert (folder / "config.json").read_bytes() == before
    assert os.listdir(folder) == ["config.json"]
    BeitConfig(hidden_size=96).save_pretrained(folder)
    assert BeitConfig.from_pretrained(folder).hidden_size == 96


def test_save_pretrained_of_an_invalid_configuration_raises(tmp_path):
    config = BeitConfig()
    config.hidden_size = 100
    with pytest.raises(ValueError, match="hidden_size=100"):
        config.save_pretrained(tmp_path / "folder")
    config = BeitConfig(note={1, 2}, other=object())
    with pytest.raises(TypeError, match=r"cannot represent note=\{1, 2\}, other="):
        config.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_from_pretrained_accepts_a_folder_or_a_file_and_overrides(tmp_path):
    BeitConfig(num_labels=3).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        config = BeitConfig.from_pretrained(path, image_size=384, attn_implementation="eager")
        assert (config.num_labels, config.image_size, config.attn_implementation) == (3, 384, "eager")


def test_from_pretrained_equals_what_was_saved_without_its_path(tmp_path):
    """As Transformers' `BeitConfig`: a path names the weights, and no weights were loaded."""
    config = BeitConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=8)
    config.save_pretrained(tmp_path / "sub")
    for read in (BeitConfig.from_pretrained(tmp_path / "sub"), BeitConfig.from_pretrained(tmp_path, subfolder="sub")):
        assert read.to_dict() == config.to_dict()
        assert read.name_or_path == BeitModel(read).name_or_path == ""
    theirs = transformers.BeitConfig.from_pretrained(tmp_path / "sub")
    assert theirs.name_or_path == ""
    BeitModel(config).save_pretrained(tmp_path)
    assert BeitModel.from_pretrained(tmp_path).config.name_or_path == str(tmp_path)


def test_from_pretrained_with_a_missing_file_raises(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no such file or folder \(expected a folder with config\.json"
    ):
        BeitConfig.from_pretrained("no-such-folder")
    with pytest.raises(FileNotFoundError, match=r"does not have config\.json at revision 'main'.*local folder"):
        BeitConfig.from_pretrained("microsoft/beit-base-patch16-224", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"the folder does not contain config\.json"):
        BeitConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "is not JSON"), ("[1]", "is a JSON list"), ('{"model_type": "vit"}', "expected 'beit'")],
)
def test_from_pretrained_with_a_file_of_other_contents_raises(text, reason, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        BeitConfig.from_pretrained(tmp_path)


def test_from_dict_with_a_string_raises():
    with pytest.raises(TypeError, match="expects a dict of fields, not a str"):
        BeitConfig.from_dict("config.json")
