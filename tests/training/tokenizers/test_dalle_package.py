"""DALL-E's encoder as the package `dall_e` builds and saves it, with random weights (`make test-dalle`)."""

from __future__ import annotations

import pytest
import torch

from beit_fast.training.tokenizers import DalleTokenizer

from .build import random_pixels

dall_e = pytest.importorskip("dall_e", reason="the package dall_e is not installed: run `make test-dalle`")

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # of the plain format


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain"])
def test_from_dalle_file_reads_the_encoder_of_the_package_and_gives_its_ids(zipped, tmp_path):
    torch.manual_seed(0)
    encoder = dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    for name, parameter in encoder.named_parameters():
        if name.endswith(".b"):
            parameter.data.normal_(std=0.3)  # the package starts them at 0
    torch.save(encoder, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    tokenizer = DalleTokenizer.from_dalle_file(tmp_path / "encoder.pkl")
    assert (tokenizer.vocab_size, tokenizer.hidden_size, tokenizer.blocks_per_group) == (512, 64, 1)
    pixels = random_pixels(2, 3, 40, 24)
    expected = encoder(dall_e.map_pixels(pixels))  # [2, 512, 5, 3]
    torch.testing.assert_close(tokenizer.logits(tokenizer.preprocess(pixels)), expected)
    assert torch.equal(tokenizer(pixels), expected.argmax(1))
    assert len(tokenizer(pixels).unique()) > 1


def test_published_sizes_are_those_of_the_package():
    with torch.device("meta"):
        own = DalleTokenizer().state_dict()
    published = dall_e.Encoder(device=torch.device("meta")).state_dict()
    assert {name: x.shape for name, x in own.items()} == {name: x.shape for name, x in published.items()}
