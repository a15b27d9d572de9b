"""Masked image modeling by other people's loops: the Auto class, labels from a tokenizer, and `Trainer`."""

import copy
import json
import pickle
import sys

import pytest
import torch
import transformers
from torch import nn

import beit_fast
from beit_fast.integrations.transformers import register, unregister, with_transformers_outputs
from beit_fast.training import BlockMaskGenerator, MaskedImageCollator
from beit_fast.training.tokenizers import DalleTokenizer, PatchColorTokenizer, VQKDTokenizer

from ..support.transformers_reference import TINY

OPTIONS = TINY | {"use_relative_position_bias": True}


@pytest.fixture(autouse=True)
def _registered():
    register()
    yield
    unregister()


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    tokenizer = PatchColorTokenizer(TINY["vocab_size"], patch_size=8, cells=2)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tokenizer


def build(tmp_path, **options):
    options = OPTIONS | {"visual_tokenizer": str(tmp_path / "tokenizer")} | options
    return transformers.AutoModelForMaskedImageModeling.from_config(transformers.BeitConfig(**options))


def pixels_and_mask(height=32, width=32, batch=3):
    """Return images from 0 to 1, and flat int64 masks as in `run_mim.py`."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, height // 4, width // 4, generator=generator)
    images = nn.functional.interpolate(images, (height, width))
    mask = (torch.rand(batch, (height // 8) * (width // 8), generator=generator) < 0.6).long()
    return images, mask


def images_of_one_color(count=8):
    return torch.rand(count, 3, 1, 1, generator=torch.Generator().manual_seed(2)).expand(-1, -1, 32, 32)


def normalized(images):
    return (images - 0.5) / 0.5


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24)])
def test_mask_without_labels_makes_those_of_the_tokenizer(height, width, tokenizer, tmp_path):
    model = build(tmp_path).eval()
    images, mask = pixels_and_mask(height, width)
    expected = tokenizer(images).flatten(1)[mask.bool()]
    inputs = {"pixel_values": normalized(images), "bool_masked_pos": mask}
    output = model(**inputs)
    assert type(output) is transformers.modeling_outputs.MaskedLMOutput
    assert torch.equal(output.loss, model(**inputs, labels=expected).loss)
    assert torch.equal(model(**inputs, return_dict=False)[0], output.loss)
    assert not torch.equal(output.loss, model(**inputs, labels=expected.roll(1)).loss)
    rectangle = mask.unflatten(1, (height // 8, width // 8)).bool()
    assert torch.equal(model(normalized(images), rectangle).loss, output.loss)


def test_mask_with_labels_keeps_them(tokenizer, tmp_path):
    model = build(tmp_path).eval()
    images, mask = pixels_and_mask()
    labels = torch.zeros(int(mask.sum()), dtype=torch.long)
    plain = beit_fast.BeitForMaskedImageModeling(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(normalized(images), mask, labels).loss, plain(normalized(images), mask, labels).loss)


@pytest.mark.parametrize("training", [True, False])
def test_forward_without_tokenizer_or_without_mask_returns_logits(training, tmp_path):
    images, mask = pixels_and_mask()
    assert build(tmp_path, visual_tokenizer=None).train(training)(normalized(images), mask).keys() == {"logits"}
    assert build(tmp_path).train(training)(normalized(images)).keys() == {"logits"}  # the folder is not read
    plain = beit_fast.BeitForMaskedImageModeling(build(tmp_path).config).train(training)
    assert plain(normalized(images), mask).loss is None


def test_labels_use_the_normalization_of_the_configuration(tokenizer, tmp_path):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    images, mask = pixels_and_mask()
    pixels = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    labels = tokenizer(images).flatten(1)[mask.bool()]
    model = build(tmp_path, pixel_mean=mean, pixel_std=std).eval()
    assert torch.equal(model(pixels, mask).loss, model(pixels, mask, labels=labels).loss)
    with pytest.raises(ValueError, match=r"std=\[0.5, 0.5, 0.5\] .*expected 0..1 .*set pixel_mean and pixel_std"):
        build(tmp_path)(pixels, mask)
    levels = (images * 255).round().byte()
    labels = tokenizer(levels).flatten(1)[mask.bool()]
    assert torch.equal(model(levels, mask).loss, model(levels, mask, labels=labels).loss)


def test_labels_resize_pixels_to_the_grid_of_the_tokenizer(tmp_path):
    torch.manual_seed(0)
    dalle = DalleTokenizer(vocab_size=TINY["vocab_size"], hidden_size=8)
    dalle.save_pretrained(tmp_path / "tokenizer")
    model = build(tmp_path, patch_size=16, image_size=64).eval()
    images = nn.functional.interpolate(torch.rand(2, 3, 4, 4), (70, 64), mode="bilinear")
    mask = torch.ones(2, 16, dtype=torch.long)
    # The model crops to whole patches; 4 x 4 patches of DALL-E are 32 x 32 pixels.
    small = nn.functional.interpolate(images[:, :, :64], (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    labels = dalle(small).flatten()
    assert len(labels.unique()) > 1
    assert torch.equal(model(normalized(images), mask).loss, model(normalized(images), mask, labels=labels).loss)


def test_tokenizer_is_no_part_of_the_model(tokenizer, tmp_path):
    model = build(tmp_path).eval()
    names = set(model.state_dict())
    images, mask = pixels_and_mask()
    loss = model(normalized(images), mask).loss
    assert set(model.state_dict()) == names
    assert len(list(model.modules())) == len(list(build(tmp_path).modules()))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(again)["_token_labels"]._tokenizers == {}
        assert torch.equal(again(normalized(images), mask).loss, loss)
    model.config.visual_tokenizer = str(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="other"):
        model(normalized(images), mask)


def test_config_json_names_the_tokenizer_and_transformers_loads_it(tokenizer, tmp_path):
    model = build(tmp_path).eval()
    images, mask = pixels_and_mask()
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["visual_tokenizer"] == str(
        tmp_path / "tokenizer"
    )
    again = transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "model")
    assert torch.equal(again(normalized(images), mask).loss, model(normalized(images), mask).loss)
    theirs = transformers.BeitForMaskedImageModeling.from_pretrained(tmp_path / "model").eval()
    assert theirs.config.visual_tokenizer == str(tmp_path / "tokenizer")
    torch.testing.assert_close(theirs(normalized(images), mask.bool()).logits, model(normalized(images), mask).logits)
    assert "visual_tokenizer" not in beit_fast.BeitConfig().to_dict()


def test_with_transformers_outputs_makes_labels(tokenizer, tmp_path):
    config = beit_fast.BeitConfig(**OPTIONS, visual_tokenizer=tmp_path / "tokenizer")
    model = with_transformers_outputs(beit_fast.BeitForMaskedImageModeling(config))
    images, mask = pixels_and_mask()
    assert model(normalized(images), mask).loss.isfinite()


def test_tokenizer_that_does_not_fit_is_one_error(tmp_path):
    images, mask = pixels_and_mask()
    with pytest.raises(FileNotFoundError, match=r"visual_tokenizer='.*tokenizer' of the configuration cannot be read"):
        build(tmp_path)(normalized(images), mask)
    PatchColorTokenizer(8, patch_size=8, cells=1).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "visual_tokenizer.json").write_text("[")
    with pytest.raises(ValueError, match="of the configuration cannot be read"):
        build(tmp_path)(normalized(images), mask)
    PatchColorTokenizer(12, patch_size=8, cells=1, num_channels=1).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"12 tokens .*at most vocab_size=11\)\n- its images have 1 channels"):
        build(tmp_path)(normalized(images), mask)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    VQKDTokenizer(8, 4, image_size=64, patch_size=16, **sizes).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"48x64 pixels are not supported"):
        build(tmp_path)(*pixels_and_mask(24, 32))


def test_mask_that_does_not_fit_is_the_error_of_the_model(tokenizer, tmp_path):
    images, mask = pixels_and_mask()
    with pytest.raises(ValueError, match=r"bool_masked_pos must be \[batch, patches\] = \[3, 16\]"):
        build(tmp_path)(normalized(images), mask[:, :9])
    with pytest.raises(ValueError, match="use_mask_token=True"):
        build(tmp_path, use_mask_token=False)(normalized(images), mask)
    with pytest.raises(TypeError, match="bool_masked_pos is of type list"):
        build(tmp_path)(normalized(images), mask.tolist())


def trainer_of(model, folder, data, steps=1, **options):
    collator = options.pop("data_collator", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=4, seed=0, learning_rate=3e-3,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, **({"save_strategy": "no"} | options),
    )  # fmt: skip
    return transformers.Trainer(model, arguments, data_collator=collator, train_dataset=data, eval_dataset=data[:4])


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("is_function", [True, False])
def test_trainer_with_the_collator_lowers_the_loss(is_function, tokenizer, tmp_path):
    """The tokenizer may be a plain function: `Trainer` would call `save_pretrained` of a collator's `tokenizer`."""
    model = build(tmp_path, visual_tokenizer=None)
    pairs = [{"pixel_values": normalized(x), "tokenizer_pixels": x, "name": "unused"} for x in images_of_one_color()]
    masks = BlockMaskGenerator(4, 6, 2, seed=0)
    used = (lambda pixels: tokenizer(pixels)) if is_function else tokenizer
    collator = MaskedImageCollator(model.config, masks, used)
    trainer = trainer_of(model, tmp_path, pairs, 40, data_collator=collator, save_strategy="steps", save_steps=40)
    trainer.train()
    first, *_, last = losses(trainer)
    assert last < 0.7 * first
    again = transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "run" / "checkpoint-40")
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), model.parameters(), strict=True))


def collate_as_run_mim(examples):
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "bool_masked_pos": torch.stack([example["mask"] for example in examples]),
    }


def run_mim_data():
    _, masks = pixels_and_mask(batch=8)
    pairs = zip(images_of_one_color(), masks, strict=True)
    return [{"pixel_values": normalized(image), "mask": mask} for image, mask in pairs]


def test_trainer_as_in_run_mim_lowers_the_loss_and_evaluates(tokenizer, tmp_path):
    model = build(tmp_path)
    trainer = trainer_of(
        model, tmp_path, run_mim_data(), 30, data_collator=collate_as_run_mim, label_names=["bool_masked_pos"]
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    trainer.save_model()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["architectures"], saved["model_type"]) == (["BeitForMaskedImageModeling"], "beit")
    theirs = transformers.BeitForMaskedImageModeling.from_pretrained(tmp_path / "run").eval()
    example = collate_as_run_mim(run_mim_data())
    torch.testing.assert_close(
        theirs(example["pixel_values"], example["bool_masked_pos"].bool()).logits,
        model.eval()(**example).logits, atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_trainer_without_labels_and_tokenizer_is_one_error(tmp_path):
    data = run_mim_data()
    without = build(tmp_path, visual_tokenizer=None)
    with pytest.raises(ValueError, match=r"no labels, so there is no loss: .*visual_tokenizer=FOLDER.*Collator$"):
        trainer_of(without, tmp_path, data, data_collator=collate_as_run_mim).train()
    plain = beit_fast.BeitForMaskedImageModeling(without.config)
    with pytest.raises(ValueError, match=r"visual_tokenizer=FOLDER.*, and its class makes no labels .*AutoModelForM"):
        trainer_of(plain, tmp_path, data, data_collator=collate_as_run_mim).train()


def test_trainer_with_its_own_loss_of_logits_needs_no_labels(tmp_path):
    model = build(tmp_path, visual_tokenizer=None)
    trainer = trainer_of(model, tmp_path, run_mim_data(), data_collator=collate_as_run_mim)
    trainer.compute_loss_func = lambda outputs, labels, **unused: outputs.logits.square().mean()
    trainer.train()
    assert len(losses(trainer)) == 1


def test_trainer_is_patched_if_it_is_imported_later(monkeypatch):
    """Stand in for the module, which this process has imported."""
    unregister()
    hooks = list(sys.meta_path)
    monkeypatch.delitem(sys.modules, "transformers.trainer")
    register()
    assert len(sys.meta_path) == len(hooks) + 1
    unregister()
    assert sys.meta_path == hooks
    assert "beit_fast" not in transformers.Trainer.compute_loss.__code__.co_filename


def test_auto_class_of_other_models_is_that_of_transformers():
    sizes = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")}
    config = transformers.ViTConfig(**sizes, patch_size=8, intermediate_size=48, encoder_stride=8)
    model = transformers.AutoModelForMaskedImageModeling.from_config(config)
    assert type(model) is transformers.ViTForMaskedImageModeling
    unregister()
    with pytest.raises(ValueError, match="BeitConfig"):
        transformers.AutoModelForMaskedImageModeling.from_config(transformers.BeitConfig(**OPTIONS))


def test_compiled_model_makes_labels(tokenizer, tmp_path):
    model = build(tmp_path).eval()
    images, mask = pixels_and_mask()
    expected = model(normalized(images), mask).loss
    torch.testing.assert_close(torch.compile(model, backend="eager")(normalized(images), mask).loss, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(normalized(images).bfloat16(), mask).loss, expected, rtol=2e-2, atol=2e-2)
