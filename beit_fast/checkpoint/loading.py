"""Load checkpoints of every supported format into a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from ..configuration.conversion import as_beit_config
from ..position_bias import Window
from ..utils.dtypes import find_dtype
from ..utils.hub import HubOptions
from ..utils.messages import count_of, join_choices, join_some
from ..utils.names import POSITION_INTERPOLATIONS
from .arguments import OrdinaryArguments, check_types, split_arguments
from .device_map import Placement
from .files import CheckpointFiles, FileChoice, find_checkpoint, find_config
from .infer_config import copy_config, infer_config, read_config
from .key_mapping import TRUNK_PREFIX, full_name, head_of, rename_keys, share_table_among_layers, to_hub_names
from .protocol import PretrainedModel
from .read_tensors import StoredTensors, read_tensors, tensors_of
from .resize_positions import TABLE, fits_window, is_position, resize_positions, square_window
from .wrappers import strip_wrappers

Model = TypeVar("Model", bound=PretrainedModel)


class SizeOptions(NamedTuple):
    """Arguments of `from_pretrained` for shapes that differ from those of the checkpoint."""

    num_labels: int | None
    image_size: int | tuple[int, int] | None
    position_interpolation: str
    ignore_mismatched_sizes: bool


class LoadOptions(NamedTuple):
    """Arguments of `from_pretrained` except the checkpoint, the configuration and its overrides."""

    implementations: Mapping[str, str | None]  # the constructor's arguments `IMPLEMENTATION_FIELDS`
    dtype: torch.dtype | str | None
    placement: Placement
    hub: HubOptions
    sizes: SizeOptions
    choice: FileChoice = FileChoice()
    use_ema: bool | None = None


@dataclass(frozen=True)
class KeyReport:
    """Parameters that differ between a checkpoint and a model, with their shapes.

    Attributes:
        missing: Parameters that only the model has.
        unexpected: Parameters that only the checkpoint has.
        mismatched: Parameters whose shapes differ: (in the checkpoint, in the model).
    """

    missing: dict[str, Sequence[int]]
    unexpected: dict[str, Sequence[int]]
    mismatched: dict[str, tuple[Sequence[int], Sequence[int]]]

    def loading_info(self, stored: StoredTensors) -> dict[str, Any]:
        """Format the report as `output_loading_info`.

        `stored` says what was read of the files, and what was left aside.
        """
        return {
            "missing_keys": set(self.missing),
            "unexpected_keys": set(self.unexpected),
            "mismatched_keys": {(key, tuple(stored), tuple(own)) for key, (stored, own) in self.mismatched.items()},
            "error_msgs": [],
            "weights_entry": stored.entry,
            "ema_weights": stored.average,
            "left_aside": list(stored.left_aside),
        }


def load_model(
    model_class: type[Model],
    name_or_path: str | os.PathLike[str] | None,
    config: Any,
    options: LoadOptions,
    keywords: Mapping[str, Any],
) -> tuple[Model, dict[str, Any]]:
    """Load a checkpoint into a new model; see `BeitPreTrainedModel.from_pretrained`.

    Returns:
        The model in evaluation mode, and its loading info.
    """
    sizes = options.sizes
    labels = {} if sizes.num_labels is None else {"num_labels": sizes.num_labels}
    ordinary, model_arguments, overrides = split_arguments(model_class, {**keywords, **labels})
    named = {"use_ema": options.use_ema, "subfolder": options.hub.subfolder}
    check_types(model_class.__name__, {**options.choice._asdict(), **named, **ordinary._asdict()})
    ordinary.check(name_or_path)
    options = _with_ordinary(options, ordinary)
    placement = options.placement
    placement.check()
    _check_interpolation(sizes.position_interpolation)
    device = placement.loading_device()
    files, stored = _find_tensors(name_or_path, options, ordinary, device)
    file_config = read_config(files.config)
    unwrapped = strip_wrappers(rename_keys(stored.tensors, ordinary.key_mapping))
    stored = stored._replace(left_aside=(*stored.left_aside, *unwrapped.left_aside))
    state, _ = to_hub_names(unwrapped.tensors)
    native = file_config or _requested_config(config, options)
    if native is None:
        native = infer_config(state, files.name, overrides, stored.options)
    target = _target_config(native if config is None else _requested_config(config, options), overrides, options)
    target.name_or_path = files.name
    if sizes.image_size is not None:
        old_window = _stored_window(state, native, files.name)
        if old_window is not None:
            state = resize_positions(state, old_window, target.window, sizes.position_interpolation)
    state = _with_tables_of_layers(state, target)

    target.dtype = _dtype_to_load(options.dtype, target, state)
    with torch.device("meta"):
        model = model_class(target, **model_arguments)
    report, fitting = _compare(model, state)
    _check(report, files.name, model, sizes.ignore_mismatched_sizes)
    uninitialized = [*report.missing, *report.mismatched]
    _fill(model, fitting, uninitialized, target.dtype, device)
    if uninitialized:
        warnings.warn(
            f"some parameters of {model_class.__name__} are not in {files.name!r} and were initialized: "
            f"{join_some(uninitialized)}. Train the model before you use its predictions.",
            stacklevel=3,
        )
    model.eval()
    placement.dispatch(model)
    return model, report.loading_info(stored)


def missing_parameters_error(source: str, class_name: str, missing: Sequence[str], expected: str) -> ValueError:
    """Return the error of callers that do not accept random parameters.

    Args:
        source: The checkpoint.
        class_name: The class of the model.
        missing: Parameters that the checkpoint does not contain.
        expected: What the user can pass instead.
    """
    return ValueError(
        f"{source} does not contain {count_of(len(missing), 'parameter')} of {class_name}, which would be random: "
        f"{join_some(missing, 8)} ({expected})"
    )


def _with_ordinary(options: LoadOptions, ordinary: OrdinaryArguments) -> LoadOptions:
    hub = options.hub._replace(force_download=ordinary.force_download)
    return options._replace(hub=hub, placement=options.placement._replace(offload_buffers=ordinary.offload_buffers))


def _find_tensors(
    name_or_path: str | os.PathLike[str] | None,
    options: LoadOptions,
    ordinary: OrdinaryArguments,
    device: torch.device,
) -> tuple[CheckpointFiles, StoredTensors]:
    """Return the files of the checkpoint and the tensors: those of the files or of `state_dict`."""
    if ordinary.state_dict is None:
        assert name_or_path is not None
        files = find_checkpoint(name_or_path, options.hub, options.choice)
        return files, read_tensors(files.weights, device, options.use_ema)
    files = CheckpointFiles("", None) if name_or_path is None else find_config(name_or_path, options.hub)
    return files, tensors_of(ordinary.state_dict, device, options.use_ema)


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """Return the dtype that was passed as `dtype` or as `torch_dtype`.

    `torch_dtype` is the older name.

    Raises:
        ValueError: If both were passed and differ.
    """
    first, second = (find_dtype(name) or name if isinstance(name, str) else name for name in (dtype, torch_dtype))
    if first is not None and second is not None and first != second:
        raise ValueError(f"{dtype=} and {torch_dtype=} are two names of one argument; pass one")
    return torch_dtype if dtype is None else dtype


def _check_interpolation(name: str) -> None:
    if name not in POSITION_INTERPOLATIONS:
        expected = join_choices(POSITION_INTERPOLATIONS)
        raise ValueError(f"position_interpolation={name!r} is not supported (expected {expected})")


def _requested_config(config: Any, options: LoadOptions) -> BeitConfig | None:
    """Convert the `config` argument: a `BeitConfig`, one of Transformers, a dict, or a path."""
    if config is None:
        return None
    if isinstance(config, (str, os.PathLike)):
        hub = options.hub._replace(subfolder="") if os.path.isfile(config) else options.hub
        return BeitConfig.from_pretrained(config, **hub._asdict())
    return copy_config(BeitConfig.from_dict(config) if isinstance(config, Mapping) else as_beit_config(config))


def _target_config(config: BeitConfig | None, overrides: Mapping[str, Any], options: LoadOptions) -> BeitConfig:
    assert config is not None
    size = {} if options.sizes.image_size is None else {"image_size": options.sizes.image_size}
    kernels = {name: value for name, value in options.implementations.items() if value is not None}
    return copy_config(config, **overrides, **size, **kernels)


def _dtype_to_load(
    requested: torch.dtype | str | None, config: BeitConfig, state: Mapping[str, Tensor]
) -> torch.dtype | None:
    """Return the requested dtype, or else the configuration's or the checkpoint's."""
    if requested is not None and requested != "auto":
        return BeitConfig(dtype=requested).dtype
    stored = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), None)
    return stored if config.dtype is None else config.dtype


def _stored_window(state: Mapping[str, Tensor], native: BeitConfig, name: str) -> Window | None:
    """Return the window of the position parameters in `state`, if any."""
    positions = {key: tensor for key, tensor in state.items() if is_position(key)}
    if not positions:
        return None
    key, tensor = next(iter(positions.items()))
    window = native.window if fits_window(key, tensor, native.window) else square_window(key, tensor)
    wrong = [key for key, tensor in positions.items() if window is None or not fits_window(key, tensor, window)]
    if window is None or wrong:
        raise ValueError(
            f"{name!r} cannot be resized: the window of {', '.join(wrong or [key])} differs from the others, or it is "
            f"neither square nor that of image_size={native.image_size} in its configuration"
        )
    return window


def _with_tables_of_layers(state: dict[str, Tensor], config: BeitConfig) -> dict[str, Tensor]:
    has_shared = f"{TRUNK_PREFIX}encoder.relative_position_bias.{TABLE}" in state
    has_own = any(key.startswith(f"{TRUNK_PREFIX}encoder.layer.") and key.endswith(TABLE) for key in state)
    needs_own = config.use_relative_position_bias and not config.use_shared_relative_position_bias
    copies = has_shared and not has_own and needs_own
    return share_table_among_layers(state, config.num_hidden_layers) if copies else state


def _compare(model: PretrainedModel, state: Mapping[str, Tensor]) -> tuple[KeyReport, dict[str, Tensor]]:
    """Compare names and shapes.

    Returns:
        The report, and the tensors that fit, by their names in `model`.
    """
    head_is_modeling = hasattr(model, "lm_head")
    expected = model.state_dict()
    stored = {key: state.get(full_name(key, head_is_modeling)) for key in expected}
    used = {full_name(key, head_is_modeling) for key in expected}
    found = {key: tensor for key, tensor in stored.items() if tensor is not None}
    report = KeyReport(
        missing={key: list(expected[key].shape) for key, tensor in stored.items() if tensor is None},
        unexpected={key: list(tensor.shape) for key, tensor in state.items() if key not in used},
        mismatched={
            key: (list(tensor.shape), list(expected[key].shape))
            for key, tensor in found.items()
            if tensor.shape != expected[key].shape
        },
    )
    return report, {key: tensor for key, tensor in found.items() if key not in report.mismatched}


def _check(report: KeyReport, name: str, model: PretrainedModel, ignore_mismatched_sizes: bool) -> None:
    """Raise one error that lists all parameters that do not fit.

    A head may be missing as a whole. Parameters of other heads may be unexpected.
    """
    head_is_modeling = hasattr(model, "lm_head")
    heads = {key: head_of(full_name(key, head_is_modeling)) for key in model.state_dict()}
    present = {heads[key] for key in heads if key not in report.missing}
    missing = {k: shape for k, shape in report.missing.items() if heads[k] is None or heads[k] in present}
    unexpected = {key: shape for key, shape in report.unexpected.items() if head_of(key) is None}
    mismatched = {} if ignore_mismatched_sizes else report.mismatched
    lines = []
    if missing:
        lines.append(f"- missing: {join_some(f'{key} {shape}' for key, shape in missing.items())}")
    if unexpected:
        lines.append(f"- unexpected: {join_some(f'{key} {shape}' for key, shape in unexpected.items())}")
    if mismatched:
        shown = (
            f"{key} is {stored} in the checkpoint and {own} in the model" for key, (stored, own) in mismatched.items()
        )
        lines.append(f"- mismatched: {join_some(shown)}")
        lines += _advice(mismatched, model.config)
    if lines:
        raise ValueError(f"{name!r} does not fit {type(model).__name__}:\n" + "\n".join(lines))


def _advice(mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]], config: BeitConfig) -> list[str]:
    lines = []
    window = next((w for key, (shape, _) in mismatched.items() if (w := _window_of_shape(key, shape))), None)
    if window is not None and window != config.window:
        lines.append(
            f"- the checkpoint is for image_size={window[0] * config.patch_size} ({window[0]}x{window[1]} patches of "
            f"{config.patch_size} pixels) and the configuration has image_size={config.image_size}: pass "
            f"image_size={config.image_size} to from_pretrained to resize its position parameters"
        )
    if any(head_of(key) is not None for key in mismatched):
        lines.append(
            "- pass ignore_mismatched_sizes=True to initialize parameters of another shape, such as a classifier"
        )
    return lines


def _window_of_shape(key: str, shape: Sequence[int]) -> Window | None:
    return square_window(key, torch.empty(*shape, device="meta")) if is_position(key) else None


@torch.no_grad()
def _fill(
    model: PretrainedModel,
    tensors: Mapping[str, Tensor],
    uninitialized: Sequence[str],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Assign tensors to a model on the meta device.

    The parameters in `uninitialized` are initialized.
    """
    empty = {key: tensor for key, tensor in model.state_dict().items() if key in set(uninitialized)}
    state = dict(tensors) | {key: torch.empty(t.shape, dtype=t.dtype, device=device) for key, t in empty.items()}
    state = {key: t.to(dtype) if dtype is not None and t.is_floating_point() else t for key, t in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}".lstrip("."): tensor for name, tensor in _own_tensors(module)}
        if own.keys() & empty.keys():
            kept = {key: tensor.clone() for key, tensor in own.items() if key not in empty}
            model._init_weights(module)
            for key, tensor in kept.items():
                own[key].copy_(tensor)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
