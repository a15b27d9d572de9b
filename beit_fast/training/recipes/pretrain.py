"""Pre-training by masked image modeling: `beit-fast pretrain`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...configuration.beit_config import BeitConfig
from ...image_processing.options import Resampling
from ...image_processing.processor import BeitImageProcessor
from ...models.beit import BeitForMaskedImageModeling
from ...utils.messages import FieldError
from ..block_masks import BlockMaskGenerator
from ..data.dataset import TrainingDataset, collate_items
from ..data.opening import open_source
from ..data.source import Example, ImageSource
from ..engine.loop import recorded_settings, train
from ..engine.processes import Processes, processes_of_run
from ..engine.recipe import Batch
from ..engine.run_folder import RunFolder
from ..engine.settings import COUNT, FRACTION, NOT_NEGATIVE, OPTIONAL_COUNT, EngineSettings, Rule, rule_errors
from ..parameter_groups import layer_decay_parameter_groups
from ..seeding import INITIALIZATION, MASKS, derived_generator, derived_seed
from ..tokenizers import PretrainedTokenizer
from ..two_views import TwoViewTransform
from .tokenizer_sources import FITTED, check_tokenizer, fit_tokenizer, read_tokenizer, second_size

_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
_MASKED, _LEAST_BLOCK, _WINDOW = 75, 16, 196  # of the paper's 14 x 14 patches


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(EngineSettings):
    """Options of pre-training; defaults are those of the paper and of unilm.

    Attributes:
        data: A folder of images, with its subfolders, or Parquet files; see `beit_fast.training.data.open_source`.
        model: "base" or "large", or a configuration: a folder, a JSON file or a name on the hub.
        init_from: A checkpoint to continue from, or None for random weights.
        tokenizer: "patch_colors" to fit one on the images, a folder or name of `load_visual_tokenizer`, DALL-E's
            `encoder.pkl`, or a `.pth` file of VQ-KD.
        vocab_size: Visual tokens of a tokenizer that is fitted here.
        input_size: Size of the model's images.
        second_input_size: Size of the tokenizer's images; None gives one token to each patch.
        num_mask_patches: Patches to mask; None is 75 of 14 x 14 patches, and in proportion.
        max_mask_patches_per_block: The largest block; None is `num_mask_patches`.
        min_mask_patches_per_block: The smallest block; None is 16 of 14 x 14 patches, and in proportion.
        layer_scale_init_value: Initial layer scale; None is 0.1, or the value of a given configuration.
        drop_path: Drop path of the last block; None is 0.1, or the value of a given configuration.
        train_interpolation, second_interpolation: Filters of the two sizes.
        color_jitter: Largest change of colors, or None.
        crop_scale: Range of the area of the crop, as a fraction of the image.
        hflip: Probability of a horizontal flip.
        image_mean, image_std: Normalization of the model's images.
        configuration: Other fields of `BeitConfig` to set.
    """

    reference_lr: ClassVar[float] = 1.5e-3
    reference_min_lr: ClassVar[float] = 1e-5
    reference_batch: ClassVar[int] = 2048

    data: Path
    model: str = "base"
    init_from: str | None = None
    tokenizer: str = FITTED
    vocab_size: int = 512
    input_size: int = 224
    second_input_size: int | None = None
    num_mask_patches: int | None = None
    max_mask_patches_per_block: int | None = None
    min_mask_patches_per_block: int | None = None
    layer_scale_init_value: float | None = None
    drop_path: float | None = None
    train_interpolation: Resampling = "bicubic"
    second_interpolation: Resampling = "lanczos"
    color_jitter: float | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    configuration: dict[str, Any] = field(default_factory=dict)
    epochs: int = 300
    warmup_epochs: float = 10.0
    opt_betas: tuple[float, float] = (0.9, 0.98)
    clip_grad: float | None = 3.0

    def errors(self) -> list[FieldError]:
        """Return every value that does not fit."""
        rules: dict[str, Rule] = {
            "vocab_size": COUNT,
            "input_size": COUNT,
            "second_input_size": OPTIONAL_COUNT,
            "num_mask_patches": OPTIONAL_COUNT,
            "max_mask_patches_per_block": OPTIONAL_COUNT,
            "min_mask_patches_per_block": OPTIONAL_COUNT,
            "layer_scale_init_value": NOT_NEGATIVE._replace(optional=True),
            "drop_path": FRACTION._replace(optional=True),
        }
        return super().errors() + rule_errors(self, rules)


def pretrain(options: PretrainOptions, conditions: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Pre-train BEiT; the same call resumes a run that was killed.

    Under torchrun all processes call it. `output` gets `model/`, which `from_pretrained` reads, `tokenizer/`,
    `log.jsonl`, `run.json` and `checkpoints/`.

    Args:
        options: What to train, on what, and how.
        conditions: Facts to write into `run.json`, such as versions and hardware.

    Returns:
        The rows of the log: `step`, `epoch`, `loss`, `accuracy` of the masked patches, `grad_norm`, `lr`,
        `images_per_second`. Empty in all but the main process.

    Raises:
        FileNotFoundError: If there is no data, configuration, checkpoint or tokenizer at a path.
        ValueError: If values or files do not fit together, or `output` has another run.
        RuntimeError: If the loss is not finite.
    """
    with processes_of_run(options.device) as processes:
        settings = options.resolved(processes.count)
        source = open_source(settings.data, "images")
        config = config_of(settings)
        extra = {"digest": source.digest(), "images": len(source)}
        folder = RunFolder(settings.output)
        processes.on_main(lambda: folder.check(recorded_settings(settings, extra, processes), settings.overwrite))
        masks = mask_generator_of(settings, config)
        tokenizer = _tokenizer(settings, config, source, folder, processes)
        recipe = PretrainRecipe(settings, config, source, masks, tokenizer.to(processes.device), extra)
        return train(
            recipe,
            settings,
            processes,
            conditions or {},
            on_begin=lambda: tokenizer.save_pretrained(folder.tokenizer),
        )


class PretrainRecipe:
    """The model, the data and the loss of pre-training; see `engine.recipe.Recipe`."""

    dataset_groups: tuple[int, ...] | None
    has_unused_parameters = False

    def __init__(
        self,
        options: PretrainOptions,
        config: BeitConfig,
        source: ImageSource,
        masks: BlockMaskGenerator,
        tokenizer: PretrainedTokenizer,
        extra: Mapping[str, Any],
    ) -> None:
        self.options, self.tokenizer, self.settings = options, tokenizer, extra
        self.model = _model(options, config, tokenizer.vocab_size)
        size = second_size(config, tokenizer, options.second_input_size)
        self.dataset = TrainingDataset(source, ViewsOf(_transform(options, config, size)), options.seed)
        self.processor = processor_of(options, self.model.config)
        self.dataset_groups = source.groups
        self.collate = PretrainCollate(masks, tokenizer, options.seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups, with and without weight decay, of one learning rate."""
        lr = self.options.lr
        assert lr is not None  # resolved
        return layer_decay_parameter_groups(self.model, lr, decay=1.0, weight_decay=self.options.weight_decay)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy and the accuracy of masked patches."""
        masked = batch["bool_masked_pos"]  # [B, N]
        with torch.no_grad():
            labels = self.tokenizer.encode(batch["tokenizer_values"]).flatten(1)[masked]
        output = model(batch["pixel_values"], bool_masked_pos=masked, labels=labels)
        accuracy = (output.logits.detach()[masked].argmax(-1) == labels).float().mean()
        return output.loss, {"accuracy": accuracy}

    def evaluate(self) -> dict[str, float]:
        """Return nothing: the log has the loss of the training images."""
        return {}


class ViewsOf:
    """Both views of an example.

    Args:
        transform: Draws the views of an image.
    """

    def __init__(self, transform: TwoViewTransform) -> None:
        self.transform = transform

    def __call__(self, example: Example, generator: torch.Generator) -> dict[str, Tensor]:
        return self.transform(example.image, generator)


class PretrainCollate:
    """Stack the views of a batch and draw its masks.

    The masks are a function of the seed and the first key of the batch.

    Args:
        masks: Draws the masks.
        tokenizer: Its `preprocess` runs here, in the workers.
        seed: The seed of the run.
    """

    def __init__(self, masks: BlockMaskGenerator, tokenizer: PretrainedTokenizer, seed: int) -> None:
        self.masks, self.preprocess, self.seed = masks, tokenizer.preprocess, seed

    def __call__(self, items: list[Any]) -> Batch:
        batch = collate_items(items)
        generator = derived_generator(self.seed, MASKS, *batch.pop("key"))
        batch["tokenizer_values"] = self.preprocess(batch.pop("tokenizer_pixels"))
        batch["bool_masked_pos"] = self.masks(len(batch["pixel_values"]), generator)  # [B, N]
        return batch


def config_of(options: PretrainOptions) -> BeitConfig:
    """Return the configuration of the model; its vocabulary is that of the tokenizer, which is not known yet.

    Raises:
        FileNotFoundError: If `model` is neither a name nor a configuration.
        ValueError: If values do not fit.
    """
    changes: dict[str, Any] = {"image_size": options.input_size, "use_mask_token": True}
    given = {"layer_scale_init_value": options.layer_scale_init_value, "drop_path_rate": options.drop_path}
    changes |= {name: value for name, value in given.items() if value is not None} | options.configuration
    source = options.model if options.init_from is None else options.init_from
    if options.init_from is not None or options.model not in _ARCHITECTURES:
        config = BeitConfig.from_pretrained(source, **changes)
    else:
        defaults = {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.1}
        config = BeitConfig(**(_ARCHITECTURES[options.model] | defaults | changes))
    if config.num_channels != 3:
        raise ValueError(f"the model {source!r} has num_channels={config.num_channels} (expected 3: images are RGB)")
    return config


def mask_generator_of(options: PretrainOptions, config: BeitConfig) -> BlockMaskGenerator:
    """Return the generator of masks, with numbers in proportion to the paper's."""
    patches = math.prod(config.window)
    masked = options.num_mask_patches
    if masked is None:
        masked = max(1, round(patches * _MASKED / _WINDOW))
    most = options.max_mask_patches_per_block
    least = options.min_mask_patches_per_block
    if least is None:
        least = max(1, min(round(patches * _LEAST_BLOCK / _WINDOW), masked if most is None else most))
    return BlockMaskGenerator(config.window, masked, least, most, flat=True)


def processor_of(options: PretrainOptions, config: BeitConfig) -> BeitImageProcessor:
    """Return the image processor of the trained model."""
    height, width = config.image_height_width
    return BeitImageProcessor(
        size={"height": height, "width": width},
        do_center_crop=False,
        image_mean=list(options.image_mean),
        image_std=list(options.image_std),
    )


def _tokenizer(
    options: PretrainOptions, config: BeitConfig, source: ImageSource, folder: RunFolder, processes: Processes
) -> PretrainedTokenizer:
    """Read the tokenizer, or fit it in the main process; a resumed run reads the one that it fitted.

    Raises:
        ValueError: If its grid is not that of the model.
    """
    if options.tokenizer != FITTED:
        tokenizer = read_tokenizer(options.tokenizer)
    else:
        size = second_size(config, None, options.second_input_size)
        transform = _transform(options, config, size)

        def fit_or_read() -> PretrainedTokenizer:
            if not options.overwrite and folder.tokenizer.exists():
                return read_tokenizer(str(folder.tokenizer))
            return fit_tokenizer(source, transform, options.vocab_size, config.patch_size, options.seed)

        tokenizer = processes.on_main(fit_or_read)
    check_tokenizer(config, tokenizer, second_size(config, tokenizer, options.second_input_size))
    return tokenizer


def _transform(options: PretrainOptions, config: BeitConfig, second: tuple[int, int]) -> TwoViewTransform:
    return TwoViewTransform(
        config.image_height_width,
        second,
        options.train_interpolation,
        options.second_interpolation,
        options.image_mean,
        options.image_std,
        scale=options.crop_scale,
        flip_probability=options.hflip,
        color_jitter=options.color_jitter,
    )


def _model(options: PretrainOptions, config: BeitConfig, vocab_size: int) -> BeitForMaskedImageModeling:
    """Build the model with random weights of the seed, or load it."""
    if options.init_from is not None:
        return BeitForMaskedImageModeling.from_pretrained(
            options.init_from,
            image_size=options.input_size,
            attn_implementation=options.attn_implementation,
            dtype=torch.float32,
            vocab_size=vocab_size,
            use_mask_token=True,
            layer_scale_init_value=config.layer_scale_init_value,
            drop_path_rate=config.drop_path_rate,
        )
    config = BeitConfig.from_dict(config.to_dict(), vocab_size=vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(options.seed, INITIALIZATION))
        model = BeitForMaskedImageModeling(config, attn_implementation=options.attn_implementation)
        _initialize(model)
    return model


@torch.no_grad()
def _initialize(model: BeitForMaskedImageModeling) -> None:
    """Start tokens and output matrices as the paper does.

    The output matrices of block `i`, from 1 on, are divided by `sqrt(2 i)` (section 2.6 of the paper). Tokens
    are normal: the LayerNorm of a mask token of zeros has a gradient of 1 / epsilon.
    """
    for token in (model.beit.embeddings.cls_token, model.beit.embeddings.mask_token):
        if token is not None:
            nn.init.trunc_normal_(token, std=model.config.initializer_range)
    layers: Any = model.beit.encoder.layer
    for index, layer in enumerate(layers, 1):
        for linear in (layer.attention.output.dense, layer.output.dense):
            linear.weight.div_(math.sqrt(2 * index))
