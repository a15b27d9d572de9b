"""`BeitConfig`: fields, defaults and JSON of Transformers, with validation."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Set
from typing import Any, ClassVar, Literal, Self, overload

import torch

from ..utils.files import CONFIG_NAME, atomic_write_text, json_text, plain, read_json_object
from ..utils.foreign_names import suggest_options
from ..utils.hub import HubOptions, find_options
from ..utils.json_file import JsonFile
from ..utils.messages import FieldError, describe, join_choices, raise_errors
from ..utils.paths import as_path
from .fields import RULES
from .labels_and_stages import (
    LABEL_FIELDS,
    STAGE_FIELDS,
    LabelsAndStages,
    default_labels,
    dependency_errors,
    known_fields,
    merge_overrides,
    resolve_aliases,
    resolve_labels,
    resolve_stages,
)

IMPLEMENTATION_FIELDS = ("attn_implementation", "patch_embed_implementation")
"""Fields that select kernels. They are not saved and not compared."""

_PRIVATE_STATE = frozenset({"_id2label", "_label2id", "_out_indices"})
# Transformers does not have these fields, so they are omitted if they have their default.
_OPTIONAL_FIELDS = ("head_dim", "pixel_mean", "pixel_std", "pixel_resize", "visual_tokenizer", "gradient_checkpointing")
# Arguments of Transformers' `from_pretrained` that do not change what is read.
_NOT_FIELDS = ("proxies", "trust_remote_code", "code_revision", "_from_auto", "_from_pipeline", "_commit_hash")
_NOT_TYPOS = frozenset({"tie_encoder_decoder"})  # a field of Transformers 4 that resembles another
# Transformers omits these fields from a file if they have their default.
_OMITTED_DEFAULTS = {
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "dtype": None,
    "id2label": default_labels(2),
    "is_encoder_decoder": False,
    "label2id": {name: index for index, name in default_labels(2).items()},
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "transformers_version": None,
}


def _alias_of(name: str) -> property:
    def read(config: BeitConfig) -> Any:
        return getattr(config, name)

    def write(config: BeitConfig, value: Any) -> None:
        setattr(config, name, value)

    return property(read, write, doc=f"Alias of `{name}`.")


class BeitConfig(LabelsAndStages, JsonFile):
    """Configuration of all BEiT models, compatible with Transformers' `BeitConfig`.

    All arguments are keywords. Unknown names become attributes and are saved; a typo or a name of timm gets a
    warning. Values are validated at construction and by `validate()`. The error lists all invalid fields.

    Args:
        vocab_size: Number of visual tokens in masked image modeling.
        hidden_size: E, channels of a token.
        num_hidden_layers, num_attention_heads: Number of blocks, and of heads H in each.
        intermediate_size: Hidden channels of the MLP.
        hidden_act: Activation of the MLP, a name in `beit_fast.layers.activations.ACTIVATIONS`.
        hidden_dropout_prob: Dropout after projections.
        attention_probs_dropout_prob: Dropout of attention weights.
        initializer_range: Standard deviation of the initial weights.
        layer_norm_eps: Epsilon of every LayerNorm.
        image_size: Native size in pixels, an int or (height, width). Forward accepts other sizes.
        patch_size: Side of a square patch in pixels.
        num_channels: Channels of an image.
        use_mask_token: Learn an embedding for masked patches.
        use_absolute_position_embeddings: Add position embeddings to the tokens.
        use_relative_position_bias, use_shared_relative_position_bias: Use a bias table for each block, or one for all.
        layer_scale_init_value: Initial layer scale (paper: 0.1 base, 1e-5 large). 0 disables layer scale.
        drop_path_rate: Stochastic depth of the last block. It grows linearly from 0 at the first block.
        use_mean_pooling: Pool the mean of the patch tokens instead of CLS.
        pool_scales: Grids of UPerNet's pyramid pooling.
        use_auxiliary_head: Add a second segmentation head in training.
        auxiliary_loss_weight, auxiliary_channels, auxiliary_num_convs, auxiliary_concat_input: Options of that head.
        semantic_loss_ignore_index: Label that the segmentation loss ignores.
        out_features, out_indices: Stages that the backbone returns, by name or index (default: the last). Negative
            indices count from the last stage. The old name of `out_indices` is `segmentation_indices`.
        add_fpn: Add a feature pyramid to the backbone. It requires four stages.
        reshape_hidden_states: Return feature maps `[B, E, h, w]` instead of `[B, N, E]`.
        head_dim: Channels of a head (default: `hidden_size / num_attention_heads`).
        pixel_mean, pixel_std: Mean and standard deviation of each channel of pixels scaled to 0..1, for uint8 images.
            See `BeitPreTrainedModel.set_pixel_normalization`.
        pixel_resize: How timm resizes and crops images for this model: entries "interpolation", "crop_pct" and
            "crop_mode" of its `pretrained_cfg`. `from_timm` sets it, and the command line reads it.
        num_labels, id2label, label2id: Classes (default: 2). Any of them determines the others.
        problem_type: Loss of the classifier: "regression", "single_label_classification",
            "multi_label_classification", or None to choose by labels.
        visual_tokenizer: Folder or hub repository of the tokenizer that makes the labels of masked image modeling, in
            a model that Transformers' Auto class builds after `register()`. See `load_visual_tokenizer`.
        output_attentions, output_hidden_states, return_dict: Defaults of the arguments of forward.
        gradient_checkpointing: Construct models with gradient checkpointing.
        dtype: Dtype of the weights or its name, such as "bfloat16" or "bf16". The old name is `torch_dtype`.
        architectures, transformers_version, _name_or_path, chunk_size_feed_forward, is_encoder_decoder:
            Fields of Transformers without effect in this package.
        attn_implementation: "eager", "sdpa", "triton" or None to choose at each call. It is not saved.
        patch_embed_implementation: "conv", "fused" or None to choose by attention. It is not saved.

    Raises:
        TypeError: If all errors are about types.
        ValueError: If any error is about a value.

    Source: arXiv 2106.08254 for the architecture; Transformers 4.57 and 5.24 for names, defaults and JSON.
    """

    model_type: ClassVar[str] = "beit"
    _file_name = CONFIG_NAME
    _commit_hash = None  # pipelines of Transformers 4 read it

    vocab_size: int = 8192
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    use_mask_token: bool = False
    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    layer_scale_init_value: float = 0.1
    drop_path_rate: float = 0.1
    use_mean_pooling: bool = True
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    use_auxiliary_head: bool = True
    auxiliary_loss_weight: float = 0.4
    auxiliary_channels: int = 256
    auxiliary_num_convs: int = 1
    auxiliary_concat_input: bool = False
    semantic_loss_ignore_index: int = 255
    add_fpn: bool = False
    reshape_hidden_states: bool = True
    head_dim: int | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    pixel_resize: dict[str, Any] | None = None
    visual_tokenizer: str | None = None
    problem_type: str | None = None
    output_attentions: bool | None = False
    output_hidden_states: bool | None = False
    return_dict: bool | None = True
    dtype: torch.dtype | None = None
    architectures: list[str] | None = None
    transformers_version: str | None = None
    _name_or_path: str = ""
    chunk_size_feed_forward: int = 0
    is_encoder_decoder: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    patch_embed_implementation: str | None = None

    def __init__(self, /, **fields: Any) -> None:
        given, errors = resolve_aliases(fields)
        errors += self._model_type_errors(given.pop("model_type", self.model_type))
        given.pop("stage_names", None)
        labels = {name: given.pop(name, None) for name in LABEL_FIELDS}
        stages = {name: given.pop(name, None) for name in STAGE_FIELDS}
        for name in RULES:
            setattr(self, name, given.pop(name, getattr(type(self), name)))
        errors += self._keep_unknown(given)
        self._id2label, self._label2id, label_errors = resolve_labels(**labels)
        self._out_indices: list[int] | None = None
        stage_errors: list[FieldError] = []
        if RULES["num_hidden_layers"].error("num_hidden_layers", self.num_hidden_layers) is None:
            self._out_indices, stage_errors = resolve_stages(self.stage_names, **stages)
        errors += label_errors + stage_errors
        errors += self._errors(skip={"add_fpn"} if stage_errors else set())
        raise_errors(type(self).__name__, errors)

    def _model_type_errors(self, model_type: Any) -> list[FieldError]:
        expected = sorted({"beit", "data2vec-vision", self.model_type})
        if model_type in expected:
            return []
        return [
            FieldError(f"{describe('model_type', model_type)} is not supported (expected {join_choices(expected)})")
        ]

    def _keep_unknown(self, fields: Mapping[str, Any]) -> list[FieldError]:
        taken = {name for name in fields if name in _PRIVATE_STATE or callable(getattr(type(self), name, None))}
        self.__dict__.update({name: value for name, value in fields.items() if name not in taken})
        for name in fields:
            advice = "" if name in taken or name in _NOT_TYPOS else suggest_options([name], known_fields())
            if advice:
                text = (
                    f"{describe(name, fields[name])} is not a field of {type(self).__name__} and has no effect{advice}"
                )
                warnings.warn(text, stacklevel=3)
        return [
            FieldError(f"{describe(name, fields[name])}: the name is taken by {type(self).__name__}")
            for name in sorted(taken)
        ]

    def __setattr__(self, name: str, value: Any) -> None:
        rule = RULES.get(name)
        super().__setattr__(name, value if rule is None else rule.coerce(value))

    def validate(self) -> None:
        """Check all fields, for use after attributes were changed.

        Raises:
            TypeError, ValueError: If fields are not valid, as at construction.
        """
        raise_errors(type(self).__name__, self._errors())

    def _errors(self, skip: Set[str] = frozenset()) -> list[FieldError]:
        checked = {name: rule.error(name, getattr(self, name)) for name, rule in RULES.items()}
        errors = [error for error in checked.values() if error is not None]
        valid = {name for name, error in checked.items() if error is None}
        return errors + dependency_errors(self, valid - skip)

    torch_dtype = _alias_of("dtype")
    name_or_path = _alias_of("_name_or_path")
    use_return_dict = _alias_of("return_dict")
    _attn_implementation = _alias_of("attn_implementation")

    @property
    def image_height_width(self) -> tuple[int, int]:
        """The native image size as (height, width), in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def window(self) -> tuple[int, int]:
        """(Wh, Ww): patches along height and width of an image of native size."""
        height, width = self.image_height_width
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """P = Wh * Ww; tokens are N = P + 1."""
        height, width = self.window
        return height * width

    @property
    def attention_head_dim(self) -> int:
        """D, channels of a head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def has_relative_position_bias(self) -> bool:
        """Whether blocks or the trunk own a relative position bias table."""
        return self.use_relative_position_bias or self.use_shared_relative_position_bias

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], /, **overrides: Any) -> Self:
        """Create a configuration from `to_dict()` of this package or Transformers, with `overrides`.

        An override also replaces derived fields: `num_labels=10` replaces label maps of another length, `out_indices`
        replaces `out_features`, and `num_hidden_layers` replaces the default stage.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}.from_dict expects a dict of fields, not a {type(values).__name__}")
        merged, errors = merge_overrides(values, overrides, default_depth=cls.num_hidden_layers)
        raise_errors(cls.__name__, errors)
        return cls(**merged)

    def update(self, values: Mapping[str, Any], /) -> None:
        """Set several fields like overrides of `from_dict`. If any is invalid, none is changed."""
        own = {**self.to_dict(), **self.implementations()}
        self.__dict__ = type(self).from_dict(own, **values).__dict__

    def implementations(self) -> dict[str, str | None]:
        """The fields that select kernels, which `to_dict` omits."""
        return {name: getattr(self, name) for name in IMPLEMENTATION_FIELDS}

    def with_implementations(self, **fields: str | None) -> Self:
        """Copy with other `implementations()`; if they are the same, return `self`."""
        if self.implementations() == self.implementations() | fields:
            return self
        changed = copy.deepcopy(self)
        for name, value in fields.items():
            setattr(changed, name, value)
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Copy every field, with JSON's types.

        The keys of `id2label` remain ints.
        """
        hidden = {*IMPLEMENTATION_FIELDS, *_PRIVATE_STATE}
        hidden |= {name for name in _OPTIONAL_FIELDS if getattr(self, name) == getattr(type(self), name)}
        values = {name: value for name, value in vars(self).items() if name not in hidden}
        values |= {name: getattr(self, name) for name in ("id2label", "label2id", "stage_names", *STAGE_FIELDS)}
        return {**{name: plain(value) for name, value in values.items()}, "model_type": self.model_type}

    def to_diff_dict(self) -> dict[str, Any]:
        """Copy the fields that are saved: those of the architecture, and others that are not the default."""
        omitted = {**_OMITTED_DEFAULTS, "_name_or_path": self._name_or_path}
        missing = object()
        return {name: value for name, value in self.to_dict().items() if omitted.get(name, missing) != value}

    def to_json_string(self, use_diff: bool = True) -> str:
        """`to_diff_dict()` or `to_dict()` as JSON with sorted keys.

        Raises:
            TypeError: If JSON cannot represent the value of an unknown field.
        """
        return json_text(self.to_diff_dict() if use_diff else self.to_dict(), owner=type(self).__name__)

    def to_json_file(self, path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string()` to `path` atomically."""
        atomic_write_text(as_path("the configuration", path), self.to_json_string(use_diff))

    def _text_to_save(self) -> str:
        self.validate()
        return self.to_json_string()

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], /, **overrides: Any) -> Self:
        """Read a configuration from a JSON file.

        Files of Transformers 4 and 5 are also supported.
        """
        return cls.from_dict(read_json_object(as_path("the configuration", path)), **overrides)

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], /, *, return_unused_kwargs: Literal[False] = False, **options: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], /, *, return_unused_kwargs: Literal[True], **options: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], /, *, return_unused_kwargs: bool = False, **options: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Read a configuration from a folder, a JSON file or the hub.

        Args:
            name_or_path: A path, or the name of a hub repository such as "org/name".
            return_unused_kwargs: Return `(config, unused)`, with the options that are not fields.
            options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download` and `subfolder` as in
                `huggingface_hub`, and fields that override those of the file. `trust_remote_code`, `code_revision` and
                `proxies` have no effect: code never runs, and `huggingface_hub` reads `HTTPS_PROXY`.

        Raises:
            FileNotFoundError: If there is no `config.json`.
        """
        given = {name: options[name] for name in HubOptions._fields if options.get(name) is not None}
        fields = {name: options[name] for name in options if name not in {*HubOptions._fields, *_NOT_FIELDS}}
        values = read_json_object(find_options(name_or_path, CONFIG_NAME, "configuration", HubOptions(**given)))
        unused = {name: fields[name] for name in fields if name not in known_fields() | values.keys()}
        if return_unused_kwargs:
            fields = {name: fields[name] for name in fields if name not in unused}
        config = cls.from_dict(values, **fields)
        return (config, unused) if return_unused_kwargs else config

    def __eq__(self, other: object) -> bool:
        """Return whether class and fields are equal.

        The implementations and the path are not compared.
        """
        if not isinstance(other, BeitConfig):
            return NotImplemented
        return type(self) is type(other) and self._comparable() == other._comparable()

    def _comparable(self) -> dict[str, Any]:
        return {**self.to_dict(), "_name_or_path": ""}

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        defaults, missing = type(self)().to_dict(), object()
        shown = {name: value for name, value in self.to_dict().items() if defaults.get(name, missing) != value}
        derived = {"label2id", "stage_names", "out_indices"} | (
            {"out_features"} if self._out_indices is None else set()
        )
        fields = [describe(name, value) for name, value in shown.items() if name not in derived]
        fields += [describe(name, value) for name, value in self.implementations().items() if value is not None]
        return f"{type(self).__name__}({', '.join(fields)})"
