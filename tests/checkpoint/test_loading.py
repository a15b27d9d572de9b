"""`from_pretrained` and `save_pretrained` against Transformers: weights, other heads, other image sizes."""

import json
import re
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import beit_fast
from beit_fast.position_bias import resize_position_embeddings, resize_table

from ..support.transformers_reference import (
    CLASSES,
    POSITIONS,
    TINY,
    main_output,
    options_for,
    random_inputs,
    randomize,
)


def write_theirs(name, folder, **options):
    """Save a model of Transformers and return it."""
    theirs = getattr(transformers, name)(transformers.BeitConfig(**(TINY | options_for(name) | options))).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs


def make_ours(name, **options):
    ours = getattr(beit_fast, name)(beit_fast.BeitConfig(**(TINY | options_for(name) | options))).eval()
    randomize(ours)
    return ours


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


def load_quietly(name, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return getattr(beit_fast, name).from_pretrained(folder, output_loading_info=True, **options)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_from_pretrained_with_a_transformers_file_matches_and_saves_it_bit_for_bit(name, position, tmp_path):
    theirs = write_theirs(name, tmp_path / "theirs", **POSITIONS[position])
    ours, info = load_quietly(name, tmp_path / "theirs")
    assert not any(info.values()), info
    assert not ours.training
    inputs = random_inputs(name, ours)
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    with torch.no_grad():
        for mine, wanted in zip(main_output(ours(**inputs)), main_output(theirs(**inputs)), strict=True):
            assert (mine - wanted).norm() / wanted.norm() < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "theirs/model.safetensors")
    if name == "BeitBackbone":
        # Transformers 5.24 writes this class's shared table under `beit.`, which the hub's files lack.
        stored = {key.removeprefix("beit."): x for key, x in stored.items()}
    assert_same_state(load_file(tmp_path / "ours/model.safetensors"), stored)
    again, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_state(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_save_pretrained_then_from_pretrained_keeps_weights_and_dtype(name, tmp_path):
    ours = make_ours(name, use_relative_position_bias=True).to(torch.bfloat16)
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [name]
    assert config["dtype"] == "bfloat16"
    again, info = load_quietly(name, tmp_path)
    assert not any(info.values())
    assert again.dtype == torch.bfloat16
    assert_same_state(again.state_dict(), ours.state_dict())
    assert all(p.requires_grad for p in again.parameters())
    assert not any(t.is_meta for t in again.state_dict().values())


def test_from_pretrained_with_in_memory_names_of_transformers_5_loads(tmp_path):
    for name in CLASSES:
        options = POSITIONS["both"] if name == "BeitModel" else POSITIONS["per layer"]
        theirs = write_theirs(name, tmp_path / name, **options)
        in_memory = {key: x.contiguous() for key, x in theirs.state_dict().items()}
        assert any(".layers.0.attention.q_proj" in f".{key}" for key in in_memory)
        save_file(in_memory, tmp_path / name / "model.safetensors")
        ours, info = load_quietly(name, tmp_path / name)
        assert not any(info.values()), info
        expected = getattr(beit_fast, name).from_pretrained(write_again(theirs, tmp_path / "again" / name))
        assert_same_state(ours.state_dict(), expected.state_dict())


def write_again(theirs, folder):
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["BeitModel", "BeitForMaskedImageModeling", "BeitForImageClassification"])
def test_from_pretrained_with_cls_pooling_loads_the_final_norm(name, tmp_path):
    write_theirs(name, tmp_path, use_mean_pooling=False, use_relative_position_bias=True)
    ours, info = load_quietly(name, tmp_path)
    assert not any(info.values())
    assert isinstance(ours.base_model.layernorm, torch.nn.LayerNorm)


def test_from_pretrained_with_another_head_initializes_its_own_and_warns_once(tmp_path):
    """The head of masked image modeling is unexpected, and the classifier is initialized."""
    trained = write_theirs("BeitForMaskedImageModeling", tmp_path, **POSITIONS["shared"])
    with pytest.warns(UserWarning, match=r"were initialized.*classifier\.weight") as caught:
        model, info = beit_fast.BeitForImageClassification.from_pretrained(
            tmp_path, num_labels=7, output_loading_info=True
        )
    assert len(caught) == 1
    assert sorted(info["missing_keys"]) == [
        "beit.pooler.layernorm.bias",
        "beit.pooler.layernorm.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    assert sorted(info["unexpected_keys"]) == ["layernorm.bias", "layernorm.weight", "lm_head.bias", "lm_head.weight"]
    assert model.classifier.weight.shape == (7, 32)
    assert 0.005 < model.classifier.weight.std() < 0.05
    assert torch.equal(model.beit.pooler.layernorm.weight, torch.ones(32))
    assert torch.equal(model.beit.embeddings.mask_token, trained.beit.embeddings.mask_token)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a Transformers checkpoint for every class."""
    options = options_for("BeitForSemanticSegmentation") | {"use_relative_position_bias": True, "out_features": None}
    folders = {name: tmp_path_factory.mktemp(name) for name in CLASSES}
    for name, folder in folders.items():
        write_theirs(name, folder, **options)
    return folders


@pytest.mark.parametrize("target", CLASSES)
@pytest.mark.parametrize("source", CLASSES)
def test_from_pretrained_with_a_file_of_any_class_loads_the_trunk(source, target, folders):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(beit_fast, target).from_pretrained(folders[source])
    stored = {key.removeprefix("beit."): x for key, x in load_file(folders[source] / "model.safetensors").items()}
    own = {key.removeprefix("beit."): x for key, x in model.state_dict().items()}
    trunk = [key for key in own if key.startswith(("embeddings.", "encoder."))]
    assert len(trunk) > 60
    assert all(torch.equal(own[key], stored[key]) for key in trunk)


def test_from_pretrained_with_a_shared_table_copies_it_to_each_layer(tmp_path):
    theirs = write_theirs("BeitModel", tmp_path, **POSITIONS["shared"])
    ours = beit_fast.BeitModel.from_pretrained(
        tmp_path, use_relative_position_bias=True, use_shared_relative_position_bias=False
    )
    tables = [x for key, x in ours.named_parameters() if key.endswith("bias_table")]
    assert len(tables) == 3
    assert len({table.data_ptr() for table in tables}) == 3
    assert all(torch.equal(table, theirs.shared_position_bias.relative_position_bias_table) for table in tables)


@pytest.mark.parametrize("size", [48, 16, (32, 64)])
def test_from_pretrained_with_image_size_matches_transformers_at_that_size(size, tmp_path):
    """Transformers resizes the table in each forward."""
    height, width = (size, size) if isinstance(size, int) else size
    theirs = write_theirs("BeitModel", tmp_path, **POSITIONS["both"], use_absolute_position_embeddings=True)
    ours = beit_fast.BeitModel.from_pretrained(tmp_path, image_size=size)
    assert ours.config.window == (height // 8, width // 8)
    pixels = torch.randn(2, 3, height, width)
    with torch.no_grad():
        mine, wanted = ours(pixels).last_hidden_state, theirs(pixels).last_hidden_state
    assert (mine - wanted).norm() / wanted.norm() < 1e-5
    table = theirs.shared_position_bias.relative_position_bias_table
    resized = ours.encoder.relative_position_bias.relative_position_bias_table
    assert torch.equal(resized, resize_table(table, (4, 4), ours.config.window))
    assert torch.equal(resized[-3:], table[-3:])
    positions = theirs.embeddings.position_embeddings
    assert torch.equal(
        ours.embeddings.position_embeddings, resize_position_embeddings(positions, (4, 4), ours.config.window)
    )


def test_save_pretrained_after_resizing_keeps_the_new_size(tmp_path):
    write_theirs("BeitModel", tmp_path / "small", **POSITIONS["per layer"])
    large = beit_fast.BeitModel.from_pretrained(tmp_path / "small", image_size=(32, 64))
    large.save_pretrained(tmp_path / "large")
    again, _ = load_quietly("BeitModel", tmp_path / "large")
    assert again.config.image_size == (32, 64)
    assert_same_state(again.state_dict(), large.state_dict())
    back = beit_fast.BeitModel.from_pretrained(tmp_path / "large", image_size=(32, 32))
    assert back.config.window == (4, 4)


def test_from_pretrained_with_another_window_raises_the_stored_size(tmp_path):
    write_theirs("BeitModel", tmp_path, **POSITIONS["per layer"])
    config = beit_fast.BeitConfig(**(TINY | POSITIONS["per layer"] | {"image_size": 64}))
    with pytest.raises(ValueError, match="does not fit BeitModel") as raised:
        beit_fast.BeitModel.from_pretrained(tmp_path, config=config)
    message = str(raised.value)
    assert "relative_position_bias_table is [52, 4] in the checkpoint and [228, 4] in the model" in message
    assert "image_size=32 (4x4 patches of 8 pixels)" in message
    assert "pass image_size=64 to from_pretrained" in message
    resized = beit_fast.BeitModel.from_pretrained(tmp_path, config=config, image_size=64)
    assert resized.config.window == (8, 8)


def test_from_pretrained_with_wrong_parameters_lists_all_in_one_error(tmp_path):
    write_theirs("BeitForImageClassification", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["beit.encoder.layer.1.output.dense.bias"]
    del state["classifier.bias"]
    state["beit.encoder.layer.1.extra"] = torch.zeros(2, 3)
    state["beit.embeddings.cls_token"] = torch.zeros(1, 1, 31)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit BeitForImageClassification") as raised:
        beit_fast.BeitForImageClassification.from_pretrained(tmp_path)
    missing, unexpected, mismatched = str(raised.value).splitlines()[1:4]
    assert missing == "- missing: beit.encoder.layer.1.output.dense.bias [32], classifier.bias [5]"
    assert unexpected == "- unexpected: beit.encoder.layer.1.extra [2, 3]"
    assert (
        mismatched
        == "- mismatched: beit.embeddings.cls_token is [1, 1, 31] in the checkpoint and [1, 1, 32] in the model"
    )


def test_from_pretrained_with_another_num_labels_needs_ignore_mismatched_sizes(tmp_path):
    theirs = write_theirs("BeitForImageClassification", tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.weight is \[5, 32\].*\n.*ignore_mismatched_sizes=True"):
        beit_fast.BeitForImageClassification.from_pretrained(tmp_path, num_labels=9)
    with pytest.warns(UserWarning, match=r"classifier\.weight, classifier\.bias"):
        model, info = beit_fast.BeitForImageClassification.from_pretrained(
            tmp_path, num_labels=9, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert info["mismatched_keys"] == {("classifier.weight", (5, 32), (9, 32)), ("classifier.bias", (5,), (9,))}
    assert model.config.num_labels == 9
    assert not model.classifier.bias.any()
    assert torch.equal(model.beit.pooler.layernorm.weight, theirs.beit.pooler.layernorm.weight)


def test_from_pretrained_without_a_mask_token_keeps_the_cls_token(tmp_path):
    theirs = write_theirs("BeitModel", tmp_path, use_mask_token=False)
    with pytest.warns(UserWarning, match="mask_token"):
        ours = beit_fast.BeitModel.from_pretrained(tmp_path, use_mask_token=True)
    assert not ours.embeddings.mask_token.any()
    assert torch.equal(ours.embeddings.cls_token, theirs.embeddings.cls_token)


def test_from_pretrained_with_options_applies_them(tmp_path):
    theirs = write_theirs("BeitModel", tmp_path)
    load = beit_fast.BeitModel.from_pretrained
    assert load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(tmp_path, torch_dtype="float16", device="cpu").dtype == torch.float16
    assert load(tmp_path, dtype="auto").dtype == torch.float32
    assert load(tmp_path, attn_implementation="eager").attn_implementation == "eager"
    assert load(tmp_path, add_pooling_layer=False).pooler is None
    assert load(tmp_path, config=theirs.config).config.hidden_size == 32
    assert load(tmp_path, config=tmp_path / "config.json").config.hidden_size == 32
    half = load(tmp_path, dtype=torch.float16)
    assert half.config.dtype == torch.float16
    assert torch.equal(half.embeddings.cls_token, theirs.embeddings.cls_token.half())
    with pytest.raises(ValueError, match="two names of one argument"):
        load(tmp_path, dtype=torch.float16, torch_dtype=torch.float32)


def test_from_pretrained_and_save_pretrained_with_wrong_arguments_raise(tmp_path):
    write_theirs("BeitModel", tmp_path)
    with pytest.raises(TypeError, match=re.escape("got unexpected arguments imagesize (expected")):
        beit_fast.BeitModel.from_pretrained(tmp_path, imagesize=64)
    with pytest.raises(
        ValueError, match=r"position_interpolation='cubic' is not supported \(expected 'bilinear' or 'geometric'\)"
    ):
        beit_fast.BeitModel.from_pretrained(tmp_path, position_interpolation="cubic")
    with pytest.raises(ValueError, match="safe_serialization=False"):
        make_ours("BeitModel").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"meta device.*cls_token"):
        make_ours("BeitModel").to("meta").save_pretrained(tmp_path)


def test_from_pretrained_keeps_the_random_state(tmp_path):
    write_theirs("BeitModel", tmp_path)
    before = torch.get_rng_state()
    beit_fast.BeitModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
