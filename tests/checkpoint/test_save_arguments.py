"""Arguments of `save_pretrained` in scripts for Transformers, and paths that are empty."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from beit_fast import BeitConfig, BeitForImageClassification, BeitImageProcessor, BeitImageProcessorFast
from beit_fast.cli import main

from ..support.models import build

MAKERS = {
    "model": build,
    "config": BeitConfig,
    "processor": BeitImageProcessor,
    "fast processor": BeitImageProcessorFast,
}
kinds = pytest.mark.parametrize("kind", MAKERS)


def files_in(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@kinds
def test_save_pretrained_in_another_process_writes_nothing(kind, tmp_path):
    MAKERS[kind]().save_pretrained(tmp_path / "new", is_main_process=False)
    assert not list(tmp_path.iterdir())
    MAKERS[kind]().save_pretrained(save_directory=tmp_path / "new", is_main_process=True)
    assert list(tmp_path.iterdir())


def test_save_pretrained_takes_the_arguments_of_accelerates_scripts(tmp_path):
    """Regression: these were TypeErrors; processes other than the main one gather an empty state dict."""
    model = build()
    model.save_pretrained(tmp_path / "none", is_main_process=False, save_function=torch.save, state_dict={})
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, is_main_process=True, save_function=torch.save, state_dict=model.state_dict())
    loaded = BeitForImageClassification.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", ["5GB", "30KB"])
def test_save_pretrained_with_a_variant_writes_the_files_of_transformers(size, tmp_path):
    config = transformers.BeitConfig(**build().config.to_diff_dict())
    theirs = transformers.BeitForImageClassification(config)
    theirs.save_pretrained(tmp_path / "theirs", variant="fp16", max_shard_size=size)
    model = build()
    model.save_pretrained(tmp_path / "ours", variant="fp16", max_shard_size=size)
    ours = set(files_in(tmp_path / "ours"))
    if size == "5GB":
        assert ours == set(files_in(tmp_path / "theirs")) == {"config.json", "model.fp16.safetensors"}
    else:
        assert "model.safetensors.index.fp16.json" in ours & set(files_in(tmp_path / "theirs"))
        assert len([name for name in ours if name.startswith("model.fp16-00001-of-")]) == 1
    for cls in (transformers.BeitForImageClassification, BeitForImageClassification):
        loaded = cls.from_pretrained(tmp_path / "ours", variant="fp16")
        assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_save_pretrained_with_a_variant_keeps_the_other_files_and_their_values(tmp_path):
    model, half = build(), build().half()
    model.save_pretrained(tmp_path)
    weights = files_in(tmp_path)["model.safetensors"]
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    shards = set(tmp_path.glob("model.fp16-*"))
    assert len(shards) > 1
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    assert set(tmp_path.glob("model.fp16-*")).isdisjoint(shards)
    assert len(set(tmp_path.glob("model.fp16-*"))) == len(shards)
    half.save_pretrained(tmp_path, variant="fp16")
    assert set(files_in(tmp_path)) == {"config.json", "model.safetensors", "model.fp16.safetensors"}
    assert files_in(tmp_path)["model.safetensors"] == weights
    assert "dtype" not in json.loads((tmp_path / "config.json").read_text())
    assert BeitForImageClassification.from_pretrained(tmp_path).dtype is torch.float32
    assert BeitForImageClassification.from_pretrained(tmp_path, variant="fp16").dtype is torch.float16
    assert load_file(tmp_path / "model.fp16.safetensors")["classifier.bias"].dtype is torch.float16


WRONG = {
    "a slash": ({"variant": "a/b"}, ValueError, r"variant='a/b' is not supported \(expected letters, digits"),
    "a number": ({"variant": 16}, TypeError, r"variant=16 is not supported \(expected a string or None\)"),
    "no function": ({"save_function": "torch.save"}, TypeError, "save_function='torch.save' is not supported"),
    "no flag": ({"is_main_process": 0}, TypeError, r"is_main_process=0 is not supported \(expected True or False\)"),
    "a typo": ({"max_shard_sise": 3}, TypeError, r"argument max_shard_sise \(expected .*did you mean 'max_shard_size'"),
    "unknown": ({"tags": []}, TypeError, r"argument tags \(expected .*is_main_process.*repo_id.*variant"),
    "no upload": ({"repo_id": "a/b"}, ValueError, "repo_id cannot be passed without push_to_hub=True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_save_pretrained_with_a_wrong_argument_says_what_is_accepted_and_writes_nothing(name, tmp_path):
    options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        build().save_pretrained(tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


def test_save_pretrained_lists_all_wrong_arguments_in_one_error(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained has 3 errors") as raised:
        build().save_pretrained(tmp_path, push_to_hub=True, repo_id="a/b/c", private=True, is_main_process=1, tag=2)
    for text in ("is_main_process=1", "unexpected argument tag", "repo_id='a/b/c' is not the name of a repository"):
        assert text in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["config", "processor"])
@pytest.mark.parametrize("name", ["variant", "save_function", "state_dict"])
def test_save_pretrained_of_one_file_takes_no_arguments_of_weights(kind, name, tmp_path):
    with pytest.raises(TypeError, match=rf"an unexpected argument {name} \(expected .*is_main_process"):
        MAKERS[kind]().save_pretrained(tmp_path / "new", **{name: None})
    assert not list(tmp_path.iterdir())


@kinds
def test_an_empty_path_is_an_error_not_the_current_folder(kind, tmp_path, monkeypatch):
    """Regression: `Path("")` is the current folder, so files of it were replaced or read."""
    saved = MAKERS[kind]()
    saved.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {name: (text, os.stat(name).st_mtime_ns) for name, text in files_in(tmp_path).items()}
    with pytest.raises(ValueError, match=r"the path of the .* is empty \(for the current folder, pass '\.'\)"):
        saved.save_pretrained("")
    with pytest.raises(ValueError, match=r"the path of the .* is empty"):
        type(saved).from_pretrained("")
    with pytest.raises(ValueError, match="repo_id='' is not the name of a repository"):
        saved.push_to_hub("")
    for wrong in (None, 3):
        with pytest.raises(TypeError, match=rf"the path of the folder is {wrong} \(expected a string or a path"):
            saved.save_pretrained(wrong)
        with pytest.raises(TypeError, match=r"\(expected a string or a path|requires state_dict"):
            type(saved).from_pretrained(wrong)
    assert {name: (text, os.stat(name).st_mtime_ns) for name, text in files_in(tmp_path).items()} == before
    assert type(saved).from_pretrained(".") is not None
    saved.save_pretrained(".")


@pytest.mark.parametrize("kind", ["config", "processor"])
def test_an_empty_path_of_a_json_file_is_an_error(kind):
    with pytest.raises(ValueError, match="is empty"):
        MAKERS[kind]().to_json_file("")
    with pytest.raises(ValueError, match="is empty"):
        MAKERS[kind].from_json_file("")


def test_convert_with_an_empty_path_is_an_error(tmp_path, monkeypatch, capsys):
    build().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(SystemExit):
        main.main(["convert", str(tmp_path / "model"), ""])
    assert "is empty (for the current folder, pass '.')" in capsys.readouterr().err
    assert main.main(["convert", "", str(tmp_path / "target")]) != 0
    assert "the path of the checkpoint is empty" in capsys.readouterr().err
    assert not list(Path().iterdir())
    assert not (tmp_path / "target").exists()
