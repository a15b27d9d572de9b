"""`push_to_hub` of models, configurations and image processors, offline: the hub is a folder."""

import fnmatch
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi

from beit_fast import (
    BeitConfig,
    BeitForImageClassification,
    BeitImageProcessor,
    BeitImageProcessorFast,
    optimize_for_inference,
)

from ..support.transformers_reference import TINY, randomize


class Hub:
    """Calls of `HfApi` in order, and one repository in a folder.

    The signatures are those of `HfApi`, so an argument that it does not have is an error.
    """

    def __init__(self, repository):
        self.repository = repository
        self.calls = []
        self.tokens = []

    def create_repo(self, api, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        self.tokens.append(api.token)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"user/{repo_id}")

    def create_branch(self, api, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, api, *, repo_id, folder_path, delete_patterns, **options):
        self.calls.append(("upload_folder", repo_id, options))
        self.tokens.append(api.token)
        new = {file.name for file in Path(folder_path).iterdir()}
        for file in list(self.repository.iterdir()):
            if file.name not in new and any(fnmatch.fnmatch(file.name, each) for each in delete_patterns or []):
                file.unlink()
        shutil.copytree(folder_path, self.repository, dirs_exist_ok=True)
        return SimpleNamespace(commit_url="commit")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    hub = Hub(repository)
    for name in ("create_repo", "create_branch", "upload_folder"):
        original = getattr(HfApi, name)

        def call(self, *args, name=name, original=original, **options):
            import inspect

            inspect.signature(original).bind(self, *args, **options)
            return getattr(hub, name)(self, *args, **options)

        monkeypatch.setattr(HfApi, name, call)
    return hub


@pytest.fixture
def model():
    model = BeitForImageClassification(BeitConfig(**TINY)).eval()
    randomize(model)
    return model


def files_in(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", ["model", "shards", "config", "processor", "fast processor"])
def test_push_to_hub_uploads_what_save_pretrained_writes(kind, hub, model, tmp_path):
    """Regression: there was no push_to_hub."""
    objects = {"config": model.config, "processor": BeitImageProcessor(), "fast processor": BeitImageProcessorFast()}
    pushed = objects.get(kind, model)
    options = {"max_shard_size": "20KB"} if kind == "shards" else {}
    (hub.repository / "README.md").write_text("kept")
    commit = pushed.push_to_hub("user/name", **options)
    assert commit.commit_url == "commit"
    pushed.save_pretrained(tmp_path / "saved", **options)
    assert files_in(hub.repository) == files_in(tmp_path / "saved") | {"README.md": b"kept"}
    assert len(files_in(tmp_path / "saved")) == {
        "model": 2,
        "shards": 2 + len(list((tmp_path / "saved").glob("model-*"))),
    }.get(kind, 1)


def test_push_to_hub_passes_the_arguments_of_transformers(hub, model):
    model.push_to_hub("name", commit_message="m", commit_description="d", private=True, token="hf_x", revision="dev")
    assert hub.calls == [
        ("create_repo", "name", {"private": True, "exist_ok": True}),
        ("create_branch", "user/name", {"branch": "dev", "exist_ok": True}),
        (
            "upload_folder",
            "user/name",
            {"commit_message": "m", "commit_description": "d", "revision": "dev", "create_pr": False},
        ),
    ]
    assert hub.tokens == ["hf_x", "hf_x"]
    hub.calls.clear()
    BeitImageProcessor().push_to_hub("user/name", create_pr=True)
    assert [name for name, _, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[-1][2]["create_pr"] is True
    assert hub.calls[-1][2]["commit_message"] == "Upload BeitImageProcessor"


@pytest.mark.parametrize("first", ["whole", "shards"])
def test_push_to_hub_replaces_weights_of_an_earlier_upload(first, hub, model):
    """Regression of a kind: a single file of an earlier upload is read before new shards."""
    sizes = {"whole": {}, "shards": {"max_shard_size": "20KB"}}
    model.push_to_hub("user/name", **sizes.pop(first))
    (hub.repository / "model.fp16.safetensors").write_bytes(b"kept")
    with torch.no_grad():
        model.classifier.bias.add_(1)
    (second,) = sizes.values()
    model.push_to_hub("user/name", **second)
    again = BeitForImageClassification.from_pretrained(hub.repository)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (hub.repository / "model.fp16.safetensors").exists()
    has_shards = bool(list(hub.repository.glob("model-*")))
    assert has_shards is (first == "whole")
    assert (hub.repository / "model.safetensors").exists() is not has_shards


@pytest.mark.parametrize("fault", ["meta", "pickle", "state_dict", "config", "name", "revision", "option"])
def test_push_to_hub_refuses_before_anything_is_created(fault, hub, model):
    name, options, error = "user/name", {}, ValueError
    if fault == "meta":
        model.to("meta")
    elif fault == "pickle":
        options = {"safe_serialization": False}
    elif fault == "state_dict":
        options = {"state_dict": {}}
    elif fault == "config":
        model.config.hidden_size = -1
    elif fault == "name":
        name = "a/b/c"
    elif fault == "revision":
        options = {"revision": "dev", "create_pr": True}
    else:
        options, error = {"tags": ["beit"]}, TypeError
    with pytest.raises(error):
        model.push_to_hub(name, **options)
    assert hub.calls == []
    assert files_in(hub.repository) == {}


FAULTS = {
    "none": (None, {}, TypeError, r"repo_id=None is not a string \(expected 'name' or 'user/name'\)"),
    "empty": ("", {}, ValueError, r"repo_id='' is not the name of a repository \(expected"),
    "typo": ("a/b", {"comit_message": "m"}, TypeError, r"comit_message \(expected .*did you mean 'commit_message'"),
    "typo of save": ("a/b", {"max_shard_sise": 1}, TypeError, "did you mean 'max_shard_size'"),
    "process": ("a/b", {"is_main_process": False}, TypeError, "an unexpected argument is_main_process"),
    "two": (None, {"tags": [], "create_pr": True, "revision": "r"}, ValueError, "push_to_hub has 3 errors"),
}


@pytest.mark.parametrize("kind", ["model", "optimized"])
@pytest.mark.parametrize("fault", FAULTS)
def test_push_to_hub_with_wrong_arguments_is_one_error_with_the_right_ones(fault, kind, hub, model):
    """Regression: None created a repository, and a typo was an error of `save_pretrained`."""
    name, options, error, message = FAULTS[fault]
    pushed = optimize_for_inference(model) if kind == "optimized" else model
    with pytest.raises(error, match=message):
        pushed.push_to_hub(name, **options)
    assert hub.calls == []


@pytest.mark.parametrize("kind", ["model", "optimized", "config", "processor"])
def test_save_pretrained_with_push_to_hub_uploads_what_it_wrote(kind, hub, model, tmp_path):
    """Regression: `push_to_hub=True` was a TypeError."""
    objects = {"config": model.config, "processor": BeitImageProcessor(), "optimized": optimize_for_inference(model)}
    saved = objects.get(kind, model)
    saved.save_pretrained(tmp_path / "my-beit", push_to_hub=True, private=True, token="hf_x", commit_message="m")
    assert hub.calls[0] == ("create_repo", "my-beit", {"private": True, "exist_ok": True})
    assert hub.calls[1][2]["commit_message"] == "m"
    assert hub.tokens == ["hf_x", "hf_x"]
    assert files_in(hub.repository) == files_in(tmp_path / "my-beit")
    hub.calls.clear()
    saved.save_pretrained(tmp_path / "my-beit", push_to_hub=True, repo_id="user/other", create_pr=True)
    assert [call[:2] for call in hub.calls] == [("create_repo", "user/other"), ("upload_folder", "user/other")]
    hub.calls.clear()
    saved.save_pretrained(tmp_path / "none", push_to_hub=True, is_main_process=False)
    assert hub.calls == []
    assert not (tmp_path / "none").exists()
    saved.save_pretrained(tmp_path / "only-here", push_to_hub=False, token=None, private=None)
    assert hub.calls == []


def test_push_to_hub_of_a_variant_replaces_files_of_that_variant_only(hub, model):
    model.push_to_hub("user/name")
    model.push_to_hub("user/name", variant="fp16", max_shard_size="20KB")
    assert len(list(hub.repository.glob("model.fp16-*"))) > 1
    model.push_to_hub("user/name", variant="fp16")
    assert set(files_in(hub.repository)) == {"config.json", "model.safetensors", "model.fp16.safetensors"}


def test_push_to_hub_leaves_pickling_and_compilation_alone(model):
    pixels = torch.randn(1, 3, 32, 32)
    expected = model(pixels).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(pixels).logits, expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(pixels).logits, expected)
    assert "push_to_hub" not in vars(model)
    assert not issubclass(BeitForImageClassification, huggingface_hub.ModelHubMixin)


def test_import_does_not_import_huggingface_hub():
    code = (
        "import sys, beit_fast; beit_fast.BeitImageProcessor; beit_fast.BeitModel.push_to_hub;"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
