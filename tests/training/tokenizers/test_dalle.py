"""DALL-E's encoder: files of the public structure, and its arithmetic."""

from __future__ import annotations

import pytest
import torch

from beit_fast.training.tokenizers import DalleTokenizer

from . import dalle_package
from .build import dalle, random_pixels

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # of the plain format


@pytest.fixture(scope="module")
def encoder() -> dalle_package.Encoder:
    torch.manual_seed(0)
    return dalle_package.Encoder(n_hid=8, vocab_size=48, n_blk_per_group=2)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
def test_from_dalle_file_reads_a_pickled_module_and_gives_its_ids(encoder, zipped, tmp_path):
    with dalle_package.installed():
        torch.save(encoder, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModuleNotFoundError, match="dall_e"):
        torch.load(tmp_path / "encoder.pkl", weights_only=False)
    tokenizer = DalleTokenizer.from_dalle_file(tmp_path / "encoder.pkl")
    assert (tokenizer.vocab_size, tokenizer.hidden_size, tokenizer.blocks_per_group) == (48, 8, 2)
    assert {name: value.tolist() for name, value in tokenizer.state_dict().items()} == {
        name: value.tolist() for name, value in encoder.state_dict().items()
    }
    pixels = random_pixels(2, 3, 40, 24)
    expected = encoder(0.8 * pixels + 0.1)
    torch.testing.assert_close(tokenizer.logits(tokenizer.preprocess(pixels)), expected)
    assert torch.equal(tokenizer(pixels), expected.argmax(1))
    assert tokenizer(pixels).shape == (2, 5, 3)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
def test_from_dalle_file_reads_a_state_dict(encoder, zipped, tmp_path):
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt", _use_new_zipfile_serialization=zipped)
    pixels = random_pixels(1, 3, 16, 16)
    assert torch.equal(
        DalleTokenizer.from_dalle_file(tmp_path / "encoder.pt")(pixels), encoder(0.8 * pixels + 0.1).argmax(1)
    )


def test_from_dalle_file_converts_half_precision(encoder, tmp_path):
    torch.save({name: value.half() for name, value in encoder.state_dict().items()}, tmp_path / "encoder.pt")
    read = DalleTokenizer.from_dalle_file(tmp_path / "encoder.pt").state_dict()
    assert {value.dtype for value in read.values()} == {torch.float32}
    assert torch.equal(read["blocks.input.w"], encoder.blocks.input.w.half().float())


def test_from_dalle_file_owns_tensors_that_share_a_storage(encoder, tmp_path):
    state = encoder.state_dict()
    state["blocks.group_1.block_1.res_path.conv_2.b"] = state["blocks.group_1.block_1.res_path.conv_1.b"]
    torch.save(state, tmp_path / "encoder.pt")
    tokenizer = DalleTokenizer.from_dalle_file(tmp_path / "encoder.pt")
    tokenizer.save_pretrained(tmp_path)
    pixels = random_pixels(1, 3, 16, 16)
    assert torch.equal(DalleTokenizer.from_pretrained(tmp_path)(pixels), tokenizer(pixels))


def test_file_that_lacks_tensors_is_one_error_that_names_them(encoder, tmp_path):
    state = encoder.state_dict()
    lost = ["blocks.input.b", "blocks.group_4.block_2.res_path.conv_4.w"]
    torch.save(
        {key: value for key, value in state.items() if key not in lost} | {"extra": torch.zeros(1)}, tmp_path / "a"
    )
    with pytest.raises(ValueError, match=f"it lacks: {', '.join(lost)}\n.*does not have: extra"):
        DalleTokenizer.from_dalle_file(tmp_path / "a")
    torch.save({"extra": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(ValueError, match=r"lacks blocks.input.w, blocks.output.conv.w \(it has extra\)"):
        DalleTokenizer.from_dalle_file(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        DalleTokenizer.from_dalle_file(tmp_path / "c")


def test_preprocess_maps_pixels_away_from_the_bounds():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat_interleave(64).view(1, 3, 8, 8)
    values = dalle().preprocess(pixels)
    torch.testing.assert_close(values[0, :, 0, 0], torch.tensor([0.1, 0.26, 0.9]))


def test_published_sizes_give_53_million_parameters():
    with torch.device("meta"):
        published = DalleTokenizer()
    shapes = {name: tuple(value.shape) for name, value in published.state_dict().items()}
    assert shapes["blocks.input.w"] == (256, 3, 7, 7)
    assert shapes["blocks.group_2.block_1.id_path.w"] == (512, 256, 1, 1)
    assert shapes["blocks.group_4.block_2.res_path.conv_1.w"] == (512, 2048, 3, 3)
    assert shapes["blocks.output.conv.w"] == (8192, 2048, 1, 1)
    assert round(sum(value.numel() for value in published.parameters()) / 1e6) == 54
