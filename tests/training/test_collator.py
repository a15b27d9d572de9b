"""Batches of masked image modeling for the models of both packages."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import beit_fast
from beit_fast.training import BlockMaskGenerator, MaskedImageCollator, TwoViewTransform

from ..support.transformers_reference import TINY

SIZES: dict[str, Any] = TINY | {"image_size": 32, "patch_size": 8, "vocab_size": 24, "use_mask_token": True}
CONFIG = beit_fast.BeitConfig(**SIZES)
MASKS = {"input_size": 4, "num_masking_patches": 6, "min_num_patches": 2}


class Tokenizer:
    """The token of a patch is its brightness."""

    vocab_size = 24

    def __call__(self, pixels: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return (F.adaptive_avg_pool2d(pixels.mean(1), 4) * 23).long()  # [B, 4, 4]


def examples(count: int = 2, **fields: Any) -> list[dict[str, Any]]:
    return [{"pixel_values": torch.randn(3, 32, 32)} | fields for _ in range(count)]


@pytest.mark.parametrize("package", [beit_fast, transformers], ids=["beit_fast", "transformers"])
def test_batch_of_transform_masks_and_tokenizer_trains_both_models(package):
    config = package.BeitConfig(**SIZES)
    transform = TwoViewTransform(32, 16, seed=0)
    views = [transform(torch.randint(256, (3, 40, 40), dtype=torch.uint8)) for _ in range(3)]
    batch = MaskedImageCollator(config, BlockMaskGenerator(**MASKS, seed=0), Tokenizer())(views)
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "pixel_values": ((3, 3, 32, 32), torch.float32),
        "bool_masked_pos": ((3, 16), torch.bool),
        "labels": ((18,), torch.int64),
    }
    model = package.BeitForMaskedImageModeling(config).eval()
    output = model(**batch)
    expected = F.cross_entropy(output.logits[batch["bool_masked_pos"]], batch["labels"])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()


def test_labels_are_the_tokens_of_masked_patches_in_row_major_order():
    tokens = [torch.arange(16).view(4, 4), torch.arange(8, 24).view(4, 4)]
    masks = [torch.zeros(4, 4, dtype=torch.bool) for _ in range(2)]
    masks[0][0, 1] = masks[0][3, 0] = masks[1][2, 3] = True
    given = [{"visual_tokens": t, "bool_masked_pos": m} for t, m in zip(tokens, masks, strict=True)]
    fields = [examples(1)[0] | names for names in given]
    batch = MaskedImageCollator(CONFIG)(fields)
    assert batch["labels"].tolist() == [1, 12, 8 + 11]
    assert torch.equal(batch["bool_masked_pos"], torch.stack(masks).flatten(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_flat_masks_of_run_mim_are_accepted(dtype):
    flat = torch.tensor([1, 0] * 8).to(dtype)
    batch = MaskedImageCollator(CONFIG)(examples(mask=flat, visual_tokens=torch.arange(16)))
    assert batch["bool_masked_pos"].dtype == torch.bool
    assert batch["bool_masked_pos"][0].tolist() == [True, False] * 8
    assert batch["labels"].tolist() == [*range(0, 16, 2)] * 2


def test_visual_tokens_may_be_lists_and_of_any_integer_dtype():
    tokens = torch.arange(16).tolist()
    batch = MaskedImageCollator(CONFIG)(examples(mask=[1] * 16, visual_tokens=tokens))
    assert batch["labels"].tolist() == tokens * 2
    batch = MaskedImageCollator(CONFIG)(examples(mask=[1] * 16, visual_tokens=torch.arange(16, dtype=torch.uint8)))
    assert batch["labels"].dtype == torch.int64


def test_rectangular_images_have_rectangular_masks():
    collator = MaskedImageCollator(CONFIG, BlockMaskGenerator((2, 5), 3, 2, seed=0))
    fields = [{"pixel_values": torch.zeros(3, 20, 40), "visual_tokens": torch.zeros(2, 5, dtype=torch.int64)}]
    assert collator(fields)["bool_masked_pos"].shape == (1, 10)


def test_collator_is_pickled_and_draws_the_same_masks():
    collator = MaskedImageCollator(CONFIG, BlockMaskGenerator(**MASKS, seed=0), Tokenizer())
    copy = pickle.loads(pickle.dumps(collator))
    fields = examples(tokenizer_pixels=torch.rand(3, 16, 16))
    assert torch.equal(copy(fields)["bool_masked_pos"], collator(fields)["bool_masked_pos"])


def test_trainer_of_transformers_trains_with_the_collator(tmp_path):
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", save_strategy="no", use_cpu=True
    )
    collator = MaskedImageCollator(CONFIG, BlockMaskGenerator(**MASKS, seed=0), Tokenizer())
    model = beit_fast.BeitForMaskedImageModeling(CONFIG)
    data = examples(4, tokenizer_pixels=torch.rand(3, 16, 16))
    arguments.remove_unused_columns = False
    trainer = transformers.Trainer(model, arguments, train_dataset=data, data_collator=collator)
    assert 0 < trainer.train().training_loss < 10


TOKENS = torch.zeros(16, dtype=torch.int64)
MASK = torch.ones(16, dtype=torch.int64)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"mask": MASK[:15], "visual_tokens": TOKENS}, ["masks are [2, 15]", "[2, 4, 4] or [2, 16]"]),
        ({"mask": MASK.view(2, 8), "visual_tokens": TOKENS}, ["masks are [2, 2, 8]"]),
        ({"mask": MASK * 2, "visual_tokens": TOKENS}, ["masks contain 2", "0 and 1"]),
        ({"mask": MASK * 0, "visual_tokens": TOKENS}, ["no masked patch"]),
        ({"mask": MASK, "visual_tokens": TOKENS + 24}, ["visual tokens contain 24", "from 0 to 23"]),
        ({"mask": MASK, "visual_tokens": TOKENS - 1}, ["visual tokens contain -1"]),
        ({"mask": MASK, "visual_tokens": TOKENS.float()}, ["visual tokens are float32", "integers"]),
        ({"mask": MASK, "visual_tokens": torch.zeros(7, 7).long()}, ["visual tokens are [2, 7, 7]", "[2, 4, 4]"]),
        ({"mask": MASK[:3] * 3, "visual_tokens": TOKENS[:4] + 30}, ["[2, 3]", "contain 3", "[2, 4]", "contain 30"]),
        ({"visual_tokens": TOKENS}, ["no masks"]),
        ({"mask": MASK}, ["no visual_tokens"]),
        ({"mask": MASK, "bool_masked_pos": MASK, "visual_tokens": TOKENS}, ["bool_masked_pos and mask"]),
        ({"mask": MASK, "visual_tokens": TOKENS, "pixel_values": torch.zeros(3, 7, 32)}, ["at least one patch of 8x8"]),
    ],
)
def test_examples_that_do_not_fit_are_one_error(fields, expected):
    with pytest.raises(ValueError, match=r"pixel_values|examples") as error:
        MaskedImageCollator(CONFIG)(examples(**fields))
    assert all(text in str(error.value) for text in expected), str(error.value)


def test_tokenizer_whose_grid_differs_is_an_error():
    collator = MaskedImageCollator(
        CONFIG, BlockMaskGenerator(**MASKS), lambda pixels: torch.zeros(len(pixels), 7, 7).long()
    )
    with pytest.raises(ValueError, match=r"visual tokens are \[2, 7, 7\] \(expected \[2, 4, 4\] or \[2, 16\]"):
        collator(examples(tokenizer_pixels=torch.zeros(3, 56, 56)))


def test_mask_generator_whose_window_differs_is_an_error():
    collator = MaskedImageCollator(CONFIG, BlockMaskGenerator(), Tokenizer())
    with pytest.raises(ValueError, match=r"masks are \[2, 14, 14\] \(expected \[2, 4, 4\]"):
        collator(examples(tokenizer_pixels=torch.zeros(3, 16, 16)))


def test_examples_of_several_sizes_or_fields_are_an_error():
    collator = MaskedImageCollator(CONFIG)
    mixed = [*examples(1, mask=MASK, visual_tokens=TOKENS), *examples(1, visual_tokens=TOKENS)]
    with pytest.raises(ValueError, match="1 of 2 examples have mask"):
        collator(mixed)
    mixed = [*examples(1, mask=MASK, visual_tokens=TOKENS), *examples(1, mask=MASK[:9], visual_tokens=TOKENS)]
    with pytest.raises(ValueError, match=r"mask have the shapes \[9\], \[16\]"):
        collator(mixed)
    with pytest.raises(ValueError, match="there are no examples"):
        collator([])


def test_source_that_is_given_twice_or_missing_is_an_error():
    collator = MaskedImageCollator(CONFIG, BlockMaskGenerator(**MASKS), Tokenizer())
    with pytest.raises(ValueError, match=r"(?s)mask and there is a mask_generator.*no tokenizer_pixels"):
        collator(examples(mask=MASK))
    with pytest.raises(ValueError, match="visual_tokens and there is a tokenizer"):
        collator(examples(visual_tokens=TOKENS))


def test_configuration_that_does_not_fit_is_one_error():
    with pytest.raises(ValueError, match=r"(?s)no mask token.*24 tokens \(expected at most vocab_size=10\)"):
        MaskedImageCollator(beit_fast.BeitConfig(vocab_size=10), tokenizer=Tokenizer())
