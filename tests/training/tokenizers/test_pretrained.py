"""What holds for every visual tokenizer: the protocol, files, and errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from beit_fast.training.tokenizers import (
    DalleTokenizer,
    PatchColorTokenizer,
    PretrainedTokenizer,
    VisualTokenizer,
    VQKDTokenizer,
    load_visual_tokenizer,
)

from .build import BUILDERS, dalle, random_pixels, tokenizers, vqkd

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(params=BUILDERS)
def tokenizer(request: pytest.FixtureRequest) -> PretrainedTokenizer:
    return BUILDERS[request.param]()


def test_call_returns_one_id_for_each_patch(tokenizer):
    ids = tokenizer(random_pixels(3, 3, 32, 32))
    assert isinstance(tokenizer, VisualTokenizer)
    assert ids.dtype == torch.int64
    assert ids.shape == (3, *tokenizer.grid_size(32)) == (3, 4, 4)
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    assert len(ids.unique()) > 1


def test_call_encodes_preprocessed_pixels_without_gradient(tokenizer):
    pixels = random_pixels(2, 3, 32, 32).requires_grad_()
    assert torch.equal(tokenizer(pixels), tokenizer.encode(tokenizer.preprocess(pixels)))
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())


def test_call_of_uint8_pixels_equals_that_of_floats(tokenizer):
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(tokenizer(pixels), tokenizer(pixels / 255))


def test_call_treats_each_image_alone(tokenizer):
    pixels = random_pixels(3, 3, 32, 32)
    assert torch.equal(tokenizer(pixels), torch.cat([tokenizer(image[None]) for image in pixels]))
    assert tokenizer(pixels[:0]).shape == (0, 4, 4)


def test_call_under_autocast_returns_the_same_ids(tokenizer):
    pixels = random_pixels(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer(pixels), tokenizer(pixels.clone()))
        ids = tokenizer(pixels)
    assert torch.equal(ids, tokenizer(pixels))


def test_saved_tokenizer_is_read_back_by_any_class(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    pixels = random_pixels(2, 3, 32, 32)
    for read in (type(tokenizer).from_pretrained, load_visual_tokenizer):
        again = read(tmp_path / "new" / "folder")
        assert type(again) is type(tokenizer)
        assert torch.equal(again(pixels), tokenizer(pixels))
        assert {
            name: torch.equal(value, tokenizer.state_dict()[name]) for name, value in again.state_dict().items()
        } == (dict.fromkeys(tokenizer.state_dict(), True))
        assert not again.training
        assert not any(parameter.requires_grad for parameter in again.parameters())
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "visual_tokenizer.json",
        "visual_tokenizer.safetensors",
    ]


@pytest.mark.parametrize(
    ("pixels", "kind", "message"),
    [
        ([[0.5]], TypeError, r"of type list \(expected a torch.Tensor\)"),
        (torch.rand(3, 32, 32), ValueError, r"pass pixel_values\[None\]"),
        (torch.rand(1, 32, 32, 3), ValueError, "the channels are last"),
        (torch.rand(1, 1, 32, 32), ValueError, r"\[batch, 3, height, width\], not \[1, 1, 32, 32\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), ValueError, r"int64 .*expected uint8, or floating"),
        (torch.full((1, 3, 32, 32), -0.5), ValueError, r"from -0.5 to -0.5 \(expected 0..1"),
        (torch.full((1, 3, 32, 32), 255.0), ValueError, r"from 255 to 255 \(expected 0..1"),
        (torch.full((1, 3, 32, 32), float("nan")), ValueError, "from nan to nan"),
        (torch.rand(1, 3, 32, 36), ValueError, r"32x36 pixels .*expected"),
        (torch.rand(1, 3, 4, 4), ValueError, r"4x4 pixels .*expected"),
    ],
    ids=["list", "image", "channels-last", "gray", "int64", "normalized", "float255", "nan", "grid", "small"],
)
def test_pixels_that_do_not_fit_raise_one_error(tokenizer, pixels, kind, message):
    with pytest.raises(kind, match=message):
        tokenizer(pixels)


def test_encode_of_other_dtypes_names_preprocess(tokenizer):
    with pytest.raises(ValueError, match=r"uint8 .*expected float32, the output of preprocess"):
        tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match="of type list"):
        tokenizer.encode([0.5])


def test_damaged_numbers_are_one_error_with_every_name(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "visual_tokenizer.safetensors"
    tensors = load_file(file)
    lost, wrong, whole, *_ = (*tensors, *tensors, *tensors)
    changed = {name: tensor for name, tensor in tensors.items() if name != lost} | {"another.weight": torch.zeros(1)}
    expected = [f"it lacks: {lost}", "does not have: another.weight"]
    if wrong != lost:
        changed |= {wrong: torch.zeros(1), whole: tensors[whole].long()}
        expected += [f"shapes differ: {wrong} [1] (expected {list(tensors[wrong].shape)})", f"{whole} torch.int64"]
    save_file(changed, file)
    with pytest.raises(ValueError, match="does not fit") as caught:
        type(tokenizer).from_pretrained(tmp_path)
    assert [text for text in expected if text not in str(caught.value)] == []


def test_fields_that_do_not_fit_are_one_error(tmp_path):
    dalle().save_pretrained(tmp_path)
    file = tmp_path / "visual_tokenizer.json"
    fields = json.loads(file.read_text())
    with pytest.raises(ValueError, match=r"visual_tokenizer_type='dalle' \(expected 'vqkd'\)"):
        VQKDTokenizer.from_pretrained(tmp_path)
    file.write_text(json.dumps({key: fields[key] for key in fields if key != "hidden_size"} | {"depth": 2}))
    with pytest.raises(ValueError, match=r"it lacks hidden_size\n.*unknown fields depth"):
        DalleTokenizer.from_pretrained(tmp_path)
    file.write_text(json.dumps(fields | {"hidden_size": "8"}))
    with pytest.raises(TypeError, match=r"hidden_size='8' \(expected a positive integer\)"):
        DalleTokenizer.from_pretrained(tmp_path)
    file.write_text(json.dumps(fields | {"visual_tokenizer_type": "vqgan"}))
    with pytest.raises(ValueError, match=r"'vqgan' \(expected 'dalle', 'vqkd' or 'patch_colors'\)"):
        load_visual_tokenizer(tmp_path)


@pytest.mark.parametrize("read", [load_visual_tokenizer, DalleTokenizer.from_pretrained])
def test_missing_files_are_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not contain visual_tokenizer\.json"):
        read(tmp_path)
    dalle().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"unexpected argument revisoin .*did you mean 'revision'"):
        read(tmp_path, revisoin="main")
    (tmp_path / "visual_tokenizer.safetensors").rename(tmp_path / "encoder.pkl")
    with pytest.raises(FileNotFoundError, match=r"does not contain visual_tokenizer\.safetensors"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"is not a folder of save_pretrained .*from_dalle_file"):
        read(tmp_path / "encoder.pkl")


def test_save_that_fails_keeps_the_old_files(tmp_path, monkeypatch):
    dalle().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="the visual tokenizer cannot be written to"):
        vqkd().save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: DalleTokenizer(vocab_size=0, hidden_size=True), ValueError, "vocab_size=0 .*\n.*hidden_size=True"),
        (lambda: DalleTokenizer(hidden_size=6), ValueError, "hidden_size=6 .*multiple of 4"),
        (lambda: VQKDTokenizer(image_size=30, patch_size=8), ValueError, "30x30 pixels do not divide"),
        (lambda: VQKDTokenizer(code_dim=2.0), TypeError, r"code_dim=2.0 \(expected a positive integer\)"),
        (lambda: PatchColorTokenizer(8, patch_size=8, cells=3), ValueError, "cells=3 .*divisor of patch_size=8"),
    ],
    ids=["zero", "odd", "grid", "float", "cells"],
)
def test_sizes_that_do_not_fit_raise_one_error(build, kind, message):
    with pytest.raises(kind, match=message):
        build()


def test_grid_sizes_are_those_of_the_papers():
    grids = {type(each).__name__: each for each in tokenizers()}
    assert grids["DalleTokenizer"].grid_size(112) == (14, 14)
    assert grids["DalleTokenizer"].grid_size((112, 64)) == (14, 8)
    with torch.device("meta"):
        published = VQKDTokenizer()
    assert (published.vocab_size, tuple(published.codebook.shape)) == (8192, (8192, 32))
    assert published.grid_size(224) == (14, 14)
    with pytest.raises(ValueError, match=r"256x256 pixels are not supported \(expected 224x224"):
        published.grid_size(256)


def hub_cache(folder, tokenizer, subfolder=""):
    """Create a cache of `huggingface_hub` that holds the tokenizer: blobs, links to them, a ref."""
    repository = folder / "models--someone--tokens"
    snapshot = repository / "snapshots" / REVISION / subfolder
    snapshot.mkdir(parents=True)
    tokenizer.save_pretrained(repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return folder


@pytest.mark.parametrize("subfolder", ["", "inner"])
@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_load_visual_tokenizer_reads_the_hub_cache_without_a_network(revision, subfolder, tokenizer, tmp_path):
    options = {"cache_dir": hub_cache(tmp_path, tokenizer, subfolder), "revision": revision, "subfolder": subfolder}
    again = load_visual_tokenizer("someone/tokens", local_files_only=True, **options)
    assert type(again) is type(tokenizer)
    pixels = random_pixels(2, 3, 32, 32)
    assert torch.equal(again(pixels), tokenizer(pixels))


@pytest.mark.parametrize("read", [load_visual_tokenizer, DalleTokenizer.from_pretrained])
def test_repository_without_a_tokenizer_names_file_cache_and_revision(read, tmp_path):
    cache = hub_cache(tmp_path, dalle())
    with pytest.raises(FileNotFoundError) as raised:
        read("someone/other", cache_dir=cache, local_files_only=True, revision="v2")
    for part in (
        "'someone/other'",
        "visual_tokenizer.json",
        "revision 'v2'",
        repr(str(cache)),
        "local_files_only=True",
    ):
        assert part in str(raised.value)
    (cache / "models--someone--tokens" / "snapshots" / REVISION / "visual_tokenizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"does not have visual_tokenizer\.safetensors"):
        read("someone/tokens", cache_dir=cache, local_files_only=True)


def test_load_visual_tokenizer_passes_its_options_to_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options))
        return str(tmp_path / file)

    dalle().save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    options = {"revision": "v2", "cache_dir": tmp_path, "token": "secret", "force_download": True, "subfolder": "inner"}
    load_visual_tokenizer("someone/tokens", **options)
    assert {(name, file) for name, file, _ in asked} == {
        ("someone/tokens", "visual_tokenizer.json"),
        ("someone/tokens", "visual_tokenizer.safetensors"),
    }
    assert all(given.items() >= options.items() for _, _, given in asked)
