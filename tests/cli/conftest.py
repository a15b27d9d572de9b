"""A checkpoint, images and reference results for runs of `beit-fast predict`."""

import pytest

from beit_fast.cli.predict.dataset import ImageBatches

from ..support.prediction import BATCH_SIZE, COUNT, main_predict, save_checkpoint, save_images


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a classifier."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Twenty files, the seventh of which is not an image."""
    folder = tmp_path_factory.mktemp("images")
    names = save_images(folder, COUNT)
    (folder / names[6]).write_bytes(b"not an image")
    return folder


@pytest.fixture
def arguments(model, images, tmp_path):
    """A run that reads in its own process, so that `read` sees it."""
    return [
        images, tmp_path / "out.jsonl", "--model", model, "--batch-size", BATCH_SIZE, "--workers", 0, "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def whole(model, images, tmp_path_factory):
    """The results of an undisturbed run, with images read in two processes."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    options = ("--batch-size", BATCH_SIZE, "--workers", 2, "--device", "cpu")
    assert main_predict(images, out, "--model", model, *options) == 1
    content = out.read_bytes()
    assert len(content.splitlines()) == COUNT
    return content


@pytest.fixture
def read(monkeypatch):
    """The names of the images that this process reads from now on."""
    names = []

    def spy(self, file, original=ImageBatches.read):
        names.append(file.name)
        return original(self, file)

    monkeypatch.setattr(ImageBatches, "read", spy)
    return names
