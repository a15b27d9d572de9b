"""Transformers 4.x has the same configuration files, parameter names and outputs."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import beit_fast

from ..support.transformers_reference import (
    CLASSES,
    POSITIONS,
    TINY,
    main_output,
    options_for,
    random_inputs,
    randomize,
)


def build(name, **options):
    values = TINY | options_for(name) | options
    theirs = getattr(transformers, name)._from_config(transformers.BeitConfig(**values), attn_implementation="sdpa")
    theirs = theirs.double().eval()
    randomize(theirs)
    ours = getattr(beit_fast, name)(beit_fast.BeitConfig(**values), attn_implementation="triton").double().eval()
    state = {key: x for key, x in theirs.state_dict().items() if "relative_position_index" not in key}
    ours.load_state_dict(state, strict=True)
    return theirs, ours


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_model_outputs_equal_transformers_4(name, position):
    theirs, ours = build(name, **POSITIONS[position])
    inputs = random_inputs(name, ours)
    with torch.no_grad():
        expected, actual = main_output(theirs(**inputs)), main_output(ours(**inputs))
    for mine, wanted in zip(actual, expected, strict=True):
        assert (mine - wanted).norm() / wanted.norm() < 1e-9


@pytest.mark.parametrize("name", CLASSES)
def test_config_round_trip_is_equal(name, tmp_path):
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    values = TINY | options_for(name) | labels | {"use_relative_position_bias": True}
    values.pop("num_labels")
    theirs = transformers.BeitConfig(**values)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = beit_fast.BeitConfig.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.BeitConfig.from_pretrained(tmp_path / "ours")
    for key, value in theirs.to_dict().items():
        if key not in ("transformers_version", "_name_or_path", "_attn_implementation_autoset"):
            assert json.dumps(getattr(again, key)) == json.dumps(value), key


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_checkpoint_round_trip_is_bit_exact(name, position, tmp_path):
    """Files of Transformers and of beit_fast have the same names and bits, and load in both."""
    theirs = getattr(transformers, name)(transformers.BeitConfig(**(TINY | options_for(name) | POSITIONS[position])))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = getattr(beit_fast, name).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    ours.save_pretrained(tmp_path / "ours")
    written, stored = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    stored = {key: x for key, x in stored.items() if not key.endswith("relative_position_index")}
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], x) for key, x in stored.items())
    again, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    state = again.state_dict()
    assert all(torch.equal(state[key], x) for key, x in theirs.state_dict().items())
