"""The recipe of fine-tuning: options arrive where they have an effect, and batches are mixed by their key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit_fast.training import FinetuneOptions
from beit_fast.training.data import open_source
from beit_fast.training.engine.processes import Processes
from beit_fast.training.recipes.finetune import FinetuneRecipe
from beit_fast.training.recipes.finetune_evaluation import Evaluator
from beit_fast.training.transforms import soft_targets

from .finetune_data import write_classes, write_pretrained, write_segmentation

CPU = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune_recipe")
    write_classes(folder / "classes")
    write_segmentation(folder / "segments")
    write_pretrained(folder / "pretrained")
    return folder


def recipe_of(folder: Path, **changes: Any) -> FinetuneRecipe:
    is_classes = changes.get("task", "classification") == "classification"
    values = {"data": folder / ("classes" if is_classes else "segments"), "model": str(folder / "pretrained")}
    options = FinetuneOptions(output=folder / "run", **(values | {"num_workers": 0} | changes)).resolved(1)
    source = open_source(options.data, "classes" if is_classes else "segmentation")
    names = list(source.classes) if is_classes and source.classes else ["sea", "land"]
    return FinetuneRecipe(options, source, None, names, CPU, {})


def test_options_of_classification_reach_the_transform_and_the_mixing(folder):
    recipe = recipe_of(
        folder,
        aa=None,
        color_jitter=0.2,
        reprob=0.3,
        remode="const",
        recount=2,
        crop_scale=(0.5, 0.9),
        hflip=0.1,
        train_interpolation="bilinear",
        mixup=0.2,
        cutmix=0.3,
        mixup_prob=0.4,
        mixup_switch_prob=0.6,
        mixup_mode="pair",
        smoothing=0.05,
        image_std=(0.1, 0.2, 0.3),
    )
    transform, mixup = recipe.dataset.transform, recipe.collate.mixup
    assert (transform.augment, transform.color_jitter, transform.filters) == (None, 0.2, ("bilinear",))
    assert (transform.erase.probability, transform.erase.mode, transform.erase.count) == (0.3, "const", 2)
    assert (transform.scale, transform.flip_probability) == ((0.5, 0.9), 0.1)
    assert (transform.image_mean, transform.image_std) == ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    assert (mixup.mixup, mixup.cutmix, mixup.probability, mixup.switch_probability) == (0.2, 0.3, 0.4, 0.6)
    assert (mixup.mode, mixup.smoothing, mixup.num_classes) == ("pair", 0.05, 3)
    assert recipe_of(folder, aa="rand-m5").dataset.transform.augment.magnitude == 5


def test_options_of_segmentation_reach_the_transform_and_the_model(folder):
    recipe = recipe_of(
        folder, task="segmentation", reduce_labels=True, ignore_index=9, hflip=0.2, color_jitter=0.0, drop_path=0.3
    )
    transform, config = recipe.dataset.transform, recipe.model.config
    assert (transform.do_reduce_labels, transform.ignore_index, transform.num_labels) == (True, 9, 2)
    assert (transform.flip_probability, transform.color_jitter, transform.size) == (0.2, False, (32, 32))
    assert (config.semantic_loss_ignore_index, config.drop_path_rate, config.out_indices) == (9, 0.3, [1, 2, 3, 4])
    assert recipe_of(folder, task="segmentation").dataset.transform.color_jitter


def test_classifier_pools_the_mean_of_the_patches_whatever_the_checkpoint_does(folder, tmp_path):
    write_pretrained(tmp_path / "cls", use_mean_pooling=False)
    model = recipe_of(folder, model=str(tmp_path / "cls")).model
    assert model.config.use_mean_pooling
    assert "beit.pooler.layernorm.weight" in model.state_dict()


def test_learning_rates_decay_by_layer(folder):
    groups = recipe_of(folder, lr=1e-2, layer_decay=0.5, weight_decay=0.3).parameter_groups()
    assert {group["lr"] for group in groups} == {1e-2 * 0.5**layer for layer in range(6)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


@pytest.mark.parametrize(("task", "lr"), [("classification", 4e-3 * 64 / 1024), ("segmentation", 3e-5 * 64 / 16)])
def test_default_learning_rate_is_in_proportion_to_the_images_of_a_step(task, lr):
    options = FinetuneOptions(
        data=Path("data"), output=Path("out"), model="m", task=task, batch_size=8, gradient_accumulation=2
    )
    assert options.resolved(4).lr == pytest.approx(lr)
    assert FinetuneOptions(**(vars(options) | {"lr": 0.5})).resolved(4).lr == 0.5


def test_batches_are_mixed_by_their_first_key(folder):
    recipe = recipe_of(folder)
    items = [[recipe.dataset[epoch, index] for index in range(4)] for epoch in (0, 0, 1)]
    for item, first in zip(items[2], items[0], strict=True):
        item |= {"pixel_values": first["pixel_values"]}  # the same images in another epoch
    first, again, other = map(recipe.collate, items)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert torch.equal(first["targets"], again["targets"])
    assert not torch.equal(first["targets"], other["targets"])


def test_loss_of_classification_is_that_of_soft_targets(folder):
    recipe = recipe_of(folder, mixup=0.0, cutmix=0.0, smoothing=0.2)
    batch = recipe.collate([recipe.dataset[0, index] for index in (0, 7, 13)])
    assert torch.equal(batch["targets"], soft_targets(torch.tensor([0, 1, 2]), 3, 0.2))
    model = recipe.model.eval()
    loss, _ = recipe.loss(model, batch)
    torch.testing.assert_close(
        loss, F.cross_entropy(model(batch["pixel_values"]).logits, torch.tensor([0, 1, 2]), label_smoothing=0.2)
    )


def test_batch_of_ignored_pixels_has_no_loss_and_others_have_that_of_the_model(folder):
    recipe = recipe_of(folder, task="segmentation")
    items = [recipe.dataset[0, index] for index in range(2)]
    batch = recipe.collate(items)
    model = recipe.model.eval()
    loss, _ = recipe.loss(model, batch)
    torch.testing.assert_close(loss, model(batch["pixel_values"], labels=batch["labels"]).loss)
    empty = recipe.collate([item | {"labels": torch.full_like(item["labels"], 255)} for item in items])
    loss, _ = recipe.loss(model, empty)
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def test_trainable_parameters_of_segmentation_are_those_with_a_gradient(folder):
    recipe = recipe_of(folder, task="segmentation")
    loss, _ = recipe.loss(recipe.model, recipe.collate([recipe.dataset[0, index] for index in range(2)]))
    loss.backward()
    named = dict(recipe.model.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == {n for n, p in named.items() if p.grad is not None}
    frozen = {name.split(".")[3] for name, p in named.items() if not p.requires_grad and ".layer." in name}
    assert frozen == {"3"}  # of the stages 1, 2, 3 and 4 the last is the output of three blocks


def test_segmentation_is_evaluated_at_the_size_of_each_annotation(folder, tmp_path):
    recipe = recipe_of(folder, task="segmentation")
    transform = recipe.dataset.transform
    source = open_source(write_segmentation(tmp_path / "partly"), "segmentation")
    for file in (tmp_path / "partly/annotations").iterdir():
        ignored = np.array(Image.open(file))
        ignored[:7] = 255
        Image.fromarray(ignored).save(file)
    evaluator = Evaluator(recipe.options, source, recipe.processor, transform.labels_of, CPU)
    scores = evaluator(recipe.model.eval())
    confusion = torch.zeros(2, 2)
    for index in range(len(source)):
        example = source.read(index)
        pixels = recipe.processor(example.image, return_tensors="pt").pixel_values
        with torch.no_grad():
            output = recipe.model(pixels)
        predicted = recipe.processor.post_process_semantic_segmentation(output, [(40, 40)])[0]
        labels = transform.labels_of(example)
        for truth in range(2):
            for guess in range(2):
                confusion[truth, guess] += ((labels == truth) & (predicted == guess)).sum()
    hits, labeled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    expected = {
        "mean_iou": (hits / (labeled + predicted - hits)).mean().item(),
        "mean_accuracy": (hits / labeled).mean().item(),
        "pixel_accuracy": (hits.sum() / confusion.sum()).item(),
    }
    assert scores == pytest.approx(expected)
