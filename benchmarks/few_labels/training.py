"""Pre-training, fine-tuning and frozen features of a tiny BEiT on the digits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beit_fast import BeitConfig, BeitForImageClassification, BeitForMaskedImageModeling
from beit_fast.training import BlockMaskGenerator, layer_decay_parameter_groups
from beit_fast.training.tokenizers import PatchColorTokenizer

from .digits import CLASSES, IMAGE_SIZE, Digits, augment, normalize

_SHARED_TABLE = "encoder.relative_position_bias.relative_position_bias_table"
_LAYER_TABLE = "encoder.layer.{}.attention.attention.relative_position_bias.relative_position_bias_table"

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class Recipe:
    """Numbers of the experiment; both arms share all that follow the pre-training.

    Attributes:
        fine_tuning: Pairs of the steps and the learning rates to choose from.
    """

    attention: str = "triton"
    hidden_size: int = 64
    layers: int = 4
    heads: int = 4
    patch_size: int = 4
    initializer_range: float = 0.1
    layer_scale: float = 1.0
    position_std: float = 0.3
    position_rate_factor: float = 5.0
    vocab_size: int = 32
    cells: int = 2
    masked_patches: int = 14
    smallest_block: int = 3
    pretraining_epochs: int = 40
    pretraining_rate: float = 3e-3
    batch_size: int = 32
    weight_decay: float = 0.05
    clip_grad: float = 3.0
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    labels_per_class: tuple[int, ...] = (1, 2, 5, 10)
    fine_tuning: tuple[tuple[int, tuple[float, ...]], ...] = ((200, (3e-3, 6e-3)), (500, (1e-3, 3e-3)))

    def config(self, **options: Any) -> BeitConfig:
        """Build the model's config."""
        return BeitConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden_size,
            image_size=IMAGE_SIZE,
            patch_size=self.patch_size,
            num_channels=1,
            initializer_range=self.initializer_range,
            layer_scale_init_value=self.layer_scale,
            use_absolute_position_embeddings=True,
            **options,
        )


def pretraining_model(recipe: Recipe) -> BeitForMaskedImageModeling:
    """Build a model for masked image modeling; one relative position bias serves all layers."""
    config = recipe.config(use_mask_token=True, use_shared_relative_position_bias=True, drop_path_rate=0.0)
    return _draw_positions(BeitForMaskedImageModeling(config, attn_implementation=recipe.attention), recipe)


def classifier(recipe: Recipe, pretrained: BeitForMaskedImageModeling | None) -> BeitForImageClassification:
    """Build a classifier from scratch, or from the trunk of a pre-trained model.

    Every layer then starts from a copy of the shared bias table.
    """
    config = recipe.config(use_relative_position_bias=True, num_labels=CLASSES, drop_path_rate=recipe.drop_path)
    model = _draw_positions(BeitForImageClassification(config, attn_implementation=recipe.attention), recipe)
    if pretrained is not None:
        weights = pretrained.beit.state_dict()
        table = weights.pop(_SHARED_TABLE)
        del weights["embeddings.mask_token"]
        weights |= {_LAYER_TABLE.format(layer): table for layer in range(recipe.layers)}
        pooler = {
            f"pooler.{name}": value for name, value in model.beit.pooler.state_dict().items()
        }  # new in this model
        model.beit.load_state_dict(weights | pooler)
    return model


def pretrain(digits: Digits, recipe: Recipe, seed: int) -> tuple[BeitForMaskedImageModeling, dict[str, Any]]:
    """Predict the visual tokens of masked patches.

    Returns:
        The model, and the loss and accuracy of the first and the last epoch with the share of the most frequent token.
    """
    torch.manual_seed(seed)
    tokenizer = PatchColorTokenizer.fit(
        digits.pixels[digits.pool], recipe.vocab_size, patch_size=recipe.patch_size, cells=recipe.cells, seed=seed
    )
    model = pretraining_model(recipe)
    side, masked = IMAGE_SIZE // recipe.patch_size, recipe.masked_patches
    draw_masks = BlockMaskGenerator(side, masked, recipe.smallest_block, flat=True, seed=seed)
    steps = recipe.pretraining_epochs * (len(digits.pool) // recipe.batch_size)
    optimizer, schedule = _optimization(model, recipe, recipe.pretraining_rate, steps)
    model.train()
    epochs = []
    for _ in range(recipe.pretraining_epochs):
        sums = torch.zeros(2)
        for batch in _batches(digits.pool, recipe.batch_size):
            pixels = augment(digits.pixels[batch])
            mask = draw_masks(len(batch))  # [B, P]
            labels = tokenizer(pixels).flatten(1)[mask]
            output = model(normalize(pixels), bool_masked_pos=mask, labels=labels)
            _step(model, output.loss, recipe, optimizer, schedule)
            hits = output.logits[mask].argmax(-1) == labels
            sums += torch.stack([output.loss.detach(), hits.float().mean()])
        epochs.append((sums / (len(digits.pool) // recipe.batch_size)).tolist())
    counts = torch.cat([tokenizer(part).flatten() for part in digits.pixels[digits.pool].split(500)]).bincount()
    ends = {"first_epoch": epochs[0], "last_epoch": epochs[-1]}
    facts = {name: dict(zip(("loss", "accuracy"), values, strict=True)) for name, values in ends.items()}
    return model, {**facts, "most_frequent_token": counts.max().item() / counts.sum().item()}


def fine_tune(
    pretrained: BeitForMaskedImageModeling | None,
    digits: Digits,
    few: Tensor,
    recipe: Recipe,
    *,
    rate: float,
    steps: int,
    seed: int,
) -> BeitForImageClassification:
    """Classify with the labels of `few` only; images and augmentation are the same in both arms."""
    torch.manual_seed(seed)
    model = classifier(recipe, pretrained)
    optimizer, schedule = _optimization(model, recipe, rate, steps)
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        size = recipe.batch_size
        batch = few[torch.randperm(len(few))[:size] if len(few) >= size else torch.randint(len(few), (size,))]
        logits = model(normalize(augment(digits.pixels[batch]))).logits
        loss = F.cross_entropy(logits, digits.labels[batch], label_smoothing=recipe.label_smoothing)
        _step(model, loss, recipe, optimizer, schedule)
    return model


@torch.no_grad()
def accuracy(model: BeitForImageClassification, digits: Digits, indices: Tensor) -> float:
    """Return the share of the images at `indices` that the model classifies correctly."""
    model.eval()
    logits = torch.cat([model(normalize(digits.pixels[part])).logits for part in indices.split(500)])
    return (logits.argmax(-1) == digits.labels[indices]).double().mean().item()


@torch.no_grad()
def frozen_features(model: BeitForImageClassification, digits: Digits, indices: Tensor) -> list[Tensor]:
    """Return the mean of the patch tokens after each layer, a list of `[n, D]`."""
    model.eval()
    parts = []
    for part in indices.split(500):
        states = model.beit(normalize(digits.pixels[part]), output_hidden_states=True).hidden_states
        parts.append([state[:, 1:].mean(1) for state in states[1:]])
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def probe(features: Tensor, digits: Digits, training: Tensor, wanted: Tensor, *, neighbors: int | None) -> float:
    """Return the accuracy of k-NN (cosine) or of logistic regression on features of all images `[n, D]`.

    Args:
        features: A row for each image.
        digits: The labels.
        training: Indices with known labels.
        wanted: Indices to classify.
        neighbors: The k of k-NN; None fits a logistic regression.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    known = features[training]
    scaled = ((features - known.mean(0)) / (known.std(0) + 1e-3)).numpy()
    model = LogisticRegression(max_iter=300) if neighbors is None else KNeighborsClassifier(neighbors, metric="cosine")
    model.fit(scaled[training], digits.labels[training].numpy())
    return float(model.score(scaled[wanted], digits.labels[wanted].numpy()))


def _draw_positions(model: _Model, recipe: Recipe) -> _Model:
    """Draw position embeddings and bias tables, which start at zero, from N(0, position_std)."""
    for name, parameter in model.named_parameters():
        if _is_position(name):
            nn.init.normal_(parameter, std=recipe.position_std)
    return model


def _is_position(name: str) -> bool:
    return name.endswith(("position_embeddings", "bias_table"))


def _optimization(
    model: nn.Module, recipe: Recipe, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, a higher rate for bias tables, and a cosine schedule after a warm-up of a tenth of the steps."""
    tables = {id(parameter) for name, parameter in model.named_parameters() if name.endswith("bias_table")}
    groups = []
    for group in layer_decay_parameter_groups(model, rate, 1.0, recipe.weight_decay):
        for is_table, factor in ((True, recipe.position_rate_factor), (False, 1.0)):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in tables) == is_table]
            groups += [{**group, "params": parameters, "lr": factor * group["lr"]}] if parameters else []
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    warm_up = max(steps // 10, 1)

    def factor_at(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor_at)


def _step(
    model: nn.Module,
    loss: Tensor,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
    optimizer.step()
    schedule.step()


def _batches(indices: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the full batches of one epoch."""
    order = indices[torch.randperm(len(indices))]
    yield from order[: len(order) // size * size].split(size)
