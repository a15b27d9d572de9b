"""Pickles of whole modules: hostile and damaged files."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch
from torch import nn

from beit_fast.training.tokenizers.module_pickle import read_module_tensors

from . import dalle_package

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # of the plain format
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])


class Hostile:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder) -> None:
        self.folder = os.fspath(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def save_encoder(file, zipped, **attributes):
    encoder = dalle_package.Encoder(n_hid=8, vocab_size=48, n_blk_per_group=1)
    for name, value in attributes.items():
        setattr(encoder, name, value)
    with dalle_package.installed():
        torch.save(encoder, file, _use_new_zipfile_serialization=zipped)
    return encoder


@FORMATS
def test_hostile_module_is_refused_by_name_and_does_not_run(zipped, tmp_path):
    file, folder = tmp_path / "encoder.pkl", tmp_path / "made"
    save_encoder(file, zipped, hook=Hostile(folder), other=nn.Linear.__init__, kind=pickle.Pickler)
    with pytest.raises(ValueError, match="was not loaded: ") as caught:
        read_module_tensors(file)
    assert not folder.exists()
    assert f"{os.mkdir.__module__}.mkdir" in str(caught.value)
    assert "pickle.Pickler" in str(caught.value)
    with dalle_package.installed():
        torch.load(file, weights_only=False)
    assert folder.exists()  # the file is hostile to a reader that runs it


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_of_any_protocol_does_not_run(protocol, tmp_path):
    folder = tmp_path / "made"
    content = pickle.dumps({"blocks.input.w": Hostile(folder)}, protocol=protocol)
    (tmp_path / "plain.pkl").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "archive.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    for name in ("plain.pkl", "archive.pkl"):
        with pytest.raises(ValueError, match=f"was not loaded: {os.mkdir.__module__}.mkdir"):
            read_module_tensors(tmp_path / name)
    assert not folder.exists()
    pickle.loads(content)
    assert folder.exists()


@pytest.mark.parametrize(
    "content",
    [
        b'cbuiltins\neval\n(S\'open("made", "w")\'\ntR.',
        b'(S\'open("made", "w")\'\nibuiltins\neval\n.',
        b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'__defaults__'\n(tstb.",
        b"ctorch.nn.modules.linear\nLinear\n}S'x'\nI1\nsb.",
        b"ctorch\nFloatStorage\n}S'x'\nI1\nsb.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81q\x00}q\x01X\x08\x00\x00\x00_modulesq\x02}q\x03X\x01\x00\x00\x00ah\x00ssb.",
    ],
    ids=["eval", "inst", "defaults", "class", "dtype", "torch.load", "circle"],
)
def test_pickle_that_is_not_of_a_module_raises_one_error(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("archive.pkl", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(ValueError, match=r"archive\.pkl"):
        read_module_tensors(tmp_path / "archive.pkl")
    assert os.listdir() == ["archive.pkl"]


@FORMATS
def test_truncated_file_raises_one_error(zipped, tmp_path):
    whole = tmp_path / "whole.pkl"
    save_encoder(whole, zipped)
    content = whole.read_bytes()
    for length in (0, 1, 2, 100, len(content) // 3, len(content) // 2, len(content) - 500, len(content) - 1):
        (tmp_path / "cut.pkl").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.pkl.*is damaged or not a file of torch.save: ."):
            read_module_tensors(tmp_path / "cut.pkl")


def rewrite(source, target, change):
    """Copy an archive; `change` gets each entry's name and content, and returns the new content or None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, content: None if "/data/" in name else content, r"blocks.* has fewer numbers than its shape \["),
        (lambda name, content: content[:4] if "/data/" in name else content, "has fewer numbers than its shape"),
        (lambda name, content: None if name.endswith("data.pkl") else content, "0 entries data.pkl"),
        (lambda name, content: b"big" if name.endswith("byteorder") else content, "big-endian"),
    ],
    ids=["lost", "short", "pickle", "order"],
)
def test_archive_with_damaged_entries_names_the_damage(change, message, tmp_path):
    save_encoder(tmp_path / "whole.pkl", True)
    rewrite(tmp_path / "whole.pkl", tmp_path / "changed.pkl", change)
    with pytest.raises(ValueError, match=message):
        read_module_tensors(tmp_path / "changed.pkl")


def test_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pkl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1_000_000)
    with pytest.raises(ValueError, match="its entries are compressed"):
        read_module_tensors(tmp_path / "bomb.pkl")


@FORMATS
def test_tensors_keep_their_strides_and_offsets(zipped, tmp_path):
    base = torch.arange(24.0).view(4, 6)
    state = {
        "columns": base.T,
        "row": base[1],
        "step": base[::2, 1::2],
        "none": torch.empty(0, 3),
        "one": torch.tensor(7),
    }
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
    read = read_module_tensors(tmp_path / "state.pt")
    assert {name: (value.dtype, value.tolist()) for name, value in read.items()} == {
        name: (value.dtype, value.tolist()) for name, value in state.items()
    }


def test_expanded_tensor_is_refused_because_it_could_fill_the_memory(tmp_path):
    torch.save({"large": torch.zeros(1).expand(1 << 40)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="large has fewer numbers than its shape"):
        read_module_tensors(tmp_path / "state.pt")


@pytest.mark.parametrize("root", [3, [torch.zeros(1)]], ids=["number", "list"])
def test_file_without_a_module_says_what_it_contains(root, tmp_path):
    torch.save(root, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=rf"contains a {type(root).__name__} \(expected a module or a state dict\)"):
        read_module_tensors(tmp_path / "state.pt")
