"""Files of checkpoints: shards, pickles, the cache of the hub, and killed saves."""

import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import traceback
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file

import beit_fast
from beit_fast.checkpoint import read_tensors as reading
from beit_fast.checkpoint.read_tensors import read_tensors

from ..support.transformers_reference import TINY, randomize

REVISION = "0123456789abcdef0123456789abcdef01234567"


def make_model(seed=0, **options):
    model = beit_fast.BeitForImageClassification(beit_fast.BeitConfig(**(TINY | options))).eval()
    randomize(model, seed)
    return model


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def load(path, **options):
    return beit_fast.BeitForImageClassification.from_pretrained(path, **options)


def test_sharded_files_load_here_and_in_transformers(tmp_path):
    ours = make_model(use_relative_position_bias=True)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="30KB")
    names = sorted(file.name for file in (tmp_path / "ours").iterdir())
    assert not (tmp_path / "ours/model.safetensors").exists()
    assert len(names) > 4
    assert names[1].startswith("model-00001-of-0000")
    again, info = transformers.BeitForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    again.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    for path in ("ours", "theirs", "theirs/model.safetensors.index.json"):
        assert_same_state(load(tmp_path / path).state_dict(), ours.state_dict())


def test_save_pretrained_writes_two_files_with_one_mode(tmp_path):
    make_model().save_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new/folder")) == ["config.json", "model.safetensors"]
    modes = {file.stat().st_mode for file in (tmp_path / "new/folder").iterdir()}
    assert len(modes) == 1, "the weights must have the mode of config.json"
    header = (tmp_path / "new/folder/model.safetensors").read_bytes()[8:200]
    assert b'"format":"pt"' in header


@pytest.mark.parametrize("is_terminal", [False, True])
def test_from_pretrained_with_shards_shows_progress_on_a_terminal(tmp_path, monkeypatch, is_terminal):
    make_model().save_pretrained(tmp_path / "one")
    make_model().save_pretrained(tmp_path / "many", max_shard_size="30KB")
    stderr = io.StringIO()
    stderr.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    load(tmp_path / "one")
    assert stderr.getvalue() == ""
    load(tmp_path / "many")
    assert ("Loading weights" in stderr.getvalue()) is is_terminal


def test_save_pretrained_with_a_bad_shard_size_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="many"):
        make_model().save_pretrained(tmp_path / "new", max_shard_size="many")
    assert not (tmp_path / "new").exists()


def test_save_pretrained_again_removes_old_weights_only(tmp_path):
    """Shards and single files replace one another; other files stay."""
    (tmp_path / "preprocessor_config.json").write_text("{}")
    for seed, size in enumerate(["30KB", "5GB", "30KB", "30KB", "60KB", "5GB"]):
        model = make_model(seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_same_state(load(tmp_path).state_dict(), model.state_dict())
        weights = {file.name for file in tmp_path.glob("*.safetensors")}
        index = tmp_path / "model.safetensors.index.json"
        assert index.exists() == (size != "5GB")
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert weights == named
        transformers.BeitForImageClassification.from_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": 3, "b": "../../keep.safetensors"}}'])
def test_save_pretrained_over_a_damaged_index_stays_in_its_folder(index, tmp_path):
    (tmp_path / "keep.safetensors").write_bytes(b"")
    folder = tmp_path / "a/b"
    folder.mkdir(parents=True)
    (folder / "model.safetensors.index.json").write_text(index)
    make_model().save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert (tmp_path / "keep.safetensors").exists()


def test_from_pretrained_with_a_pickle_does_not_run_code(tmp_path):
    model = make_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_state(load(tmp_path).state_dict(), model.state_dict())
    assert_same_state(load(tmp_path / "pytorch_model.bin").state_dict(), model.state_dict())

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"model": model.state_dict(), "extra": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="contains objects other than tensors and plain data, and was not loaded"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load(tmp_path)
    assert not (tmp_path / "trapped").exists()


def test_from_pretrained_with_a_pickle_and_an_unsafe_torch_raises(tmp_path, monkeypatch):
    torch.save(make_model().state_dict(), tmp_path / "model.pth")
    monkeypatch.setattr(reading.torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ValueError, match=r"torch 2\.9\.1\+cpu cannot read pickles safely.*expected .*torch 2\.10"):
        load(tmp_path / "model.pth")


def test_from_pretrained_with_a_damaged_or_foreign_file_raises(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged or not a safetensors file"):
        load(tmp_path)
    (tmp_path / "cut.pth").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"cut\.pth'"):
        load(tmp_path / "cut.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="does not contain a state dict, nor does its 'model'"):
        load(tmp_path / "empty.pth")
    (tmp_path / "weights.h5").write_bytes(b"HDF")
    with pytest.raises(ValueError, match=r"is not a weights file \(expected \.safetensors"):
        load(tmp_path / "weights.h5")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"does not contain weights \(expected model\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", 3])
def test_from_pretrained_with_an_index_out_of_its_folder_raises(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="does not have a weight_map from parameters to files of its folder"):
        load(tmp_path)


def test_read_tensors_with_missing_or_overlapping_shards_raises(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="30KB")
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    with pytest.raises(ValueError, match="which another shard also contains"):
        read_tensors([first, first])
    second.unlink()
    with pytest.raises(FileNotFoundError, match=f"lists shards that are not in its folder: {second.name}"):
        load(tmp_path)


def hub_cache(folder, model, **save_options):
    """Create a cache with the layout of `huggingface_hub`: blobs, links to them, a ref."""
    repository = folder / "models--someone--beit-tiny"
    model.save_pretrained(folder / "saved", **save_options)
    (repository / "snapshots" / REVISION).mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    for number, file in enumerate((folder / "saved").iterdir()):
        file.rename(repository / "blobs" / str(number))
        (repository / "snapshots" / REVISION / file.name).symlink_to(f"../../blobs/{number}")
    return folder


@pytest.mark.parametrize("size", ["5GB", "30KB"])
@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_from_pretrained_reads_the_hub_cache_without_a_network(revision, size, tmp_path):
    model = make_model(use_shared_relative_position_bias=True)
    cache = hub_cache(tmp_path, model, max_shard_size=size)
    loaded = load("someone/beit-tiny", cache_dir=cache, local_files_only=True, revision=revision)
    assert_same_state(loaded.state_dict(), model.state_dict())
    assert loaded.config.name_or_path == "someone/beit-tiny"
    config = beit_fast.BeitConfig.from_pretrained("someone/beit-tiny", cache_dir=cache, local_files_only=True)
    assert config == loaded.config


def test_from_pretrained_with_cached_pickles_only_loads(tmp_path):
    model = make_model()
    cache = hub_cache(tmp_path, model)
    snapshot = cache / "models--someone--beit-tiny/snapshots" / REVISION
    (snapshot / "model.safetensors").unlink()
    names = list(model.state_dict())
    shards = {"pytorch_model-00001-of-00002.bin": names[:20], "pytorch_model-00002-of-00002.bin": names[20:]}
    for file, keys in shards.items():
        torch.save({key: model.state_dict()[key] for key in keys}, snapshot / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (snapshot / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for options in ({"local_files_only": True}, {}):
        assert_same_state(load("someone/beit-tiny", cache_dir=cache, **options).state_dict(), model.state_dict())


@pytest.mark.parametrize("local_files_only", [True, False])
def test_from_pretrained_with_an_unknown_repository_lists_files_and_cache(local_files_only, tmp_path):
    cache = hub_cache(tmp_path, make_model())
    with pytest.raises(FileNotFoundError) as raised:
        load("someone/other", cache_dir=cache, local_files_only=local_files_only, revision="v2")
    message = str(raised.value)
    for part in (
        "'someone/other'",
        "any of model.safetensors, model.safetensors.index.json, pytorch_model.bin",
        "revision 'v2'",
        repr(str(cache)),
        "pass a local folder with config.json and model.safetensors",
    ):
        assert part in message
    assert ("(local_files_only=True)" in message) == local_files_only


@pytest.mark.parametrize("name", ["./no/such/folder", "a/b/c", "no such name", "weights.safetensors"])
def test_from_pretrained_with_a_missing_path_raises(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is not a file, a folder or the name of a hub repository"):
        load(name)


def run_killed(save):
    """Run `save` in a forked process and return whether it was killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads; the child does not use them
        child = os.fork()
    if child == 0:
        try:
            save()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_at_call(number):
    """Kill this process at the given call of `os` that changes the disk."""
    calls = itertools.count()

    def killing(function):
        def call(*arguments, **options):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, killing(getattr(os, name)))


@pytest.mark.parametrize(("old_size", "new_size"), [("5GB", "5GB"), ("60KB", "60KB"), ("5GB", "60KB"), ("60KB", "5GB")])
def test_save_pretrained_killed_at_any_call_leaves_one_whole_checkpoint(old_size, new_size, tmp_path):
    """The old model is loaded up to one call, and the new one after it."""
    old, new = make_model(0), make_model(1)
    old.save_pretrained(tmp_path / "old", max_shard_size=old_size)
    loaded = []
    for number in itertools.count():
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", folder)

        def save(folder=folder, number=number):
            kill_at_call(number)
            new.save_pretrained(folder, max_shard_size=new_size)

        was_killed = run_killed(save)
        state = load(folder).state_dict()
        loaded.append("new" if torch.equal(state["classifier.weight"], new.classifier.weight) else "old")
        assert_same_state(state, (new if loaded[-1] == "new" else old).state_dict())
        if not was_killed:
            break
    assert {"old", "new"} == set(loaded)
    assert loaded == sorted(loaded, reverse=True)
    first_new = loaded.index("new")
    for number, model in ((first_new - 1, old), (first_new, new)):
        theirs, info = transformers.BeitForImageClassification.from_pretrained(
            tmp_path / str(number), output_loading_info=True
        )
        assert not any(info.values())
        assert torch.equal(theirs.classifier.weight, model.classifier.weight)
    new.save_pretrained(tmp_path / "0")
    assert sorted(os.listdir(tmp_path / "0")) == ["config.json", "model.safetensors"]


def test_save_pretrained_killed_inside_a_write_keeps_the_old_checkpoint(tmp_path):
    """The kernel kills the process when it writes more than half of the weights."""
    old, new = make_model(0), make_model(1)
    old.save_pretrained(tmp_path)
    half = (tmp_path / "model.safetensors").stat().st_size // 2

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
        new.save_pretrained(tmp_path)

    assert run_killed(save)
    assert list(tmp_path.glob(".unfinished-*/config.json"))
    assert not list(tmp_path.glob(".unfinished-*/model.safetensors"))
    assert_same_state(load(tmp_path).state_dict(), old.state_dict())
    old.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_save_pretrained_with_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        make_model(1).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert_same_state(load_file(tmp_path / "model.safetensors"), before)
