"""Repositories of the hub without a connection, and local paths that are mistyped."""

import os
import subprocess
import sys

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from beit_fast import BeitForImageClassification, BeitModel
from beit_fast.cli import main
from beit_fast.utils.hub import HubOptions, Repository

from ..checkpoint.test_files import hub_cache, make_model
from ..support.prediction import save_image


@pytest.fixture
def downloads(monkeypatch):
    """The option `local_files_only` of every download; none finds a file."""
    asked = []

    def download(name, file, *, local_files_only, **options):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not in the cache") if local_files_only else EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def answer(monkeypatch, error):
    asked = []

    def metadata(url, **options):
        asked.append(url)
        raise error

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", metadata)
    return asked


def test_repository_without_a_connection_is_asked_once(monkeypatch, downloads, tmp_path):
    asked = answer(monkeypatch, ConnectionRefusedError("nobody listens"))
    repository = Repository("some/thing", HubOptions(cache_dir=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nor on the network \(nobody listens\)"):
        repository.fetch_first(("model.safetensors", "pytorch_model.bin"))
    assert repository.fetch_optional("config.json") is None
    assert len(asked) == 1
    assert downloads == [True] * 3


def test_repository_that_lacks_a_file_is_still_asked_for_others(monkeypatch, downloads, tmp_path):
    asked = answer(monkeypatch, EntryNotFoundError("404"))
    repository = Repository("some/thing", HubOptions(cache_dir=tmp_path))
    assert repository.fetch_optional("preprocessor_config.json") is None
    assert repository.fetch_optional("config.json") is None
    assert len(asked) == 1
    assert downloads == [False] * 2


def test_cached_files_are_not_asked_for_twice(monkeypatch, tmp_path):
    """Only the download asks, and takes the cache if there is no connection."""
    asked = answer(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = hub_cache(tmp_path, make_model())
    assert isinstance(BeitModel.from_pretrained("someone/beit-tiny", cache_dir=cache), BeitModel)
    assert asked == []


def test_classify_offline_is_one_line_without_waiting(tmp_path):
    """Regression: 27 seconds and twelve lines of retries before the error, and the images were looked at last."""
    save_image(tmp_path / "a.png", 0)
    (tmp_path / "m" / "not_here").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "beit_fast", "classify", "a.png", "none.png", "--model", "m/nothere"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first == "failed: none.png: cannot be read: there is no such file"
    assert second.startswith("beit-fast classify: no checkpoint 'm/nothere': there is no such file or folder")
    assert "(did you mean 'm/not_here'?)" in second
    assert "Connection refused" in second


@pytest.mark.parametrize("name", ["chekpoint", "sub/folder/chekpoint"])
def test_mistyped_path_is_compared_with_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right = name.replace("chek", "check")
    os.makedirs(right)
    with pytest.raises(FileNotFoundError) as caught:
        BeitForImageClassification.from_pretrained(name, local_files_only=True)
    assert f"(did you mean {right!r}?)" in str(caught.value)


def test_name_that_resembles_nothing_has_no_suggestion(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "a.png", 0)
    assert main.main(["classify", "a.png", "--model", "some/thing", "--local-files-only"]) == 2
    assert "did you mean" not in capsys.readouterr().err
