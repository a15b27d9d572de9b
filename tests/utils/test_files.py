"""Atomic writes and the errors of JSON files."""

import errno
import os
import stat

import pytest
import torch

from beit_fast.utils import files
from beit_fast.utils.files import (
    atomic_write,
    atomic_write_text,
    json_text,
    plain,
    read_json_object,
    unfinished_folder,
    writing,
)


@pytest.mark.parametrize("name", ["config.json", "out.parquet"])
def test_atomic_write_replaces_the_file_and_keeps_its_suffix(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    with atomic_write(path) as unfinished:
        assert unfinished.parent == path.parent
        assert unfinished.suffix == path.suffix
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == [name]
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_writing_names_what_cannot_be_written(tmp_path):
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError) as caught, writing("the file", path):
        path.write_text("new")
    assert str(caught.value) == f"the file cannot be written to {str(path)!r}: No such file or directory"
    assert caught.value.errno == errno.ENOENT


def test_writing_keeps_messages_that_are_not_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"^the network is down$"), writing("the file", tmp_path):
        raise OSError("the network is down")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_atomic_write_with_a_failing_call_keeps_the_old_file(call, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / "config.json"
    path.write_text("old")
    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_atomic_write_with_an_exception_in_the_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")

    def write():
        with atomic_write(path) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_atomic_write_flushes_the_file_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    calls = []
    flush, replace = files.flush_to_disk, os.replace
    monkeypatch.setattr(files, "flush_to_disk", lambda path: (calls.append(path.is_dir()), flush(path)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    atomic_write_text(tmp_path / "config.json", "new")
    assert calls == [False, "replace", True]


def test_unfinished_folder_removes_folders_of_dead_processes_only(tmp_path, monkeypatch):
    node = files.platform.node()
    dead, alive, elsewhere = (tmp_path / f".unfinished-{name}-x" for name in (f"{node}-1", f"{node}-2", "other-1"))
    for folder in (dead, alive, elsewhere):
        folder.mkdir()

    def kill(process, signal):
        if process == 1:
            raise ProcessLookupError

    monkeypatch.setattr(files.os, "kill", kill)
    with unfinished_folder(tmp_path) as folder:
        (folder / "file").touch()
        assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere, folder])
    assert not folder.exists()


def test_json_text_lists_every_value_that_json_cannot_represent():
    with pytest.raises(TypeError, match=r"the run cannot be written: JSON cannot represent a=\{1\}, b="):
        json_text({"a": {1}, "b": object(), "c": 1}, "the run")


def test_plain_copies_with_the_types_of_json():
    value = {"dtype": torch.float16, "sizes": (1, [2])}
    copy = plain(value)
    assert copy == {"dtype": "float16", "sizes": [1, [2]]}
    assert copy["sizes"][1] is not value["sizes"][1]


@pytest.mark.parametrize(("text", "reason"), [("{", "is not JSON"), ("[1]", "is a JSON list")])
def test_read_json_object_rejects_other_files(text, reason, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=rf"file\.json' {reason}"):
        read_json_object(tmp_path / "file.json")
