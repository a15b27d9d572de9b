"""Fields of a `BeitConfig` that depend on one another: aliases, labels, stages, sizes, overrides."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

from ..utils.messages import FieldError, describe, raise_errors
from .fields import COUNT, RULES, is_integer, to_integer, to_list
from .generic_names import SingleConfig

ALIASES = {
    "torch_dtype": "dtype",
    "segmentation_indices": "out_indices",
    "_attn_implementation": "attn_implementation",
    "name_or_path": "_name_or_path",
}
LABEL_FIELDS = ("num_labels", "id2label", "label2id")
STAGE_FIELDS = ("out_features", "out_indices")


def known_fields() -> frozenset[str]:
    """Names of all fields of a `BeitConfig`, with their older spellings."""
    return frozenset({*RULES, *ALIASES, *LABEL_FIELDS, *STAGE_FIELDS})


def dependency_errors(config: Any, valid: Set[str]) -> list[FieldError]:
    """Errors between fields of a `BeitConfig`; only fields in `valid` are compared."""
    errors = []
    if valid >= {"hidden_size", "num_attention_heads", "head_dim"}:
        errors += _head_errors(config)
    if valid >= {"image_size", "patch_size"}:
        errors += _window_errors(config)
    if valid >= {"num_hidden_layers", "add_fpn"}:
        errors += _stage_errors(config)
    if valid >= {"num_channels", "pixel_mean", "pixel_std"}:
        errors += _pixel_errors(config)
    return errors + _label_errors(config)


def _head_errors(config: Any) -> list[FieldError]:
    if config.head_dim is not None or config.hidden_size % config.num_attention_heads == 0:
        return []
    expected = f"a multiple of num_attention_heads={config.num_attention_heads}, or set head_dim"
    return [FieldError(f"hidden_size={config.hidden_size} is not supported (expected {expected})")]


def _window_errors(config: Any) -> list[FieldError]:
    if min(config.image_height_width) >= config.patch_size:
        return []
    expected = f"sides of at least patch_size={config.patch_size}"
    return [FieldError(f"image_size={config.image_size} is too small (expected {expected})")]


def _stage_errors(config: Any) -> list[FieldError]:
    _, errors = resolve_stages(config.stage_names, None, config._out_indices)
    if not errors and config.add_fpn and len(config.out_indices) != 4:
        expected = "four stages, such as [3, 5, 7, 11]"
        errors = [FieldError(f"add_fpn=True does not support out_indices={config.out_indices} (expected {expected})")]
    return errors


def _pixel_errors(config: Any) -> list[FieldError]:
    mean, std = config.pixel_mean, config.pixel_std
    if mean is None and std is None:
        return []
    if mean is not None and std is not None and len(mean) == len(std) == config.num_channels:
        return []
    given = f"{describe('pixel_mean', mean)} with {describe('pixel_std', std)}"
    expected = f"num_channels={config.num_channels} numbers each, or None for both"
    return [FieldError(f"{given} is not supported (expected {expected})")]


def _label_errors(config: Any) -> list[FieldError]:
    _, _, errors = resolve_labels(id2label=config.id2label, label2id=config.label2id)
    if config.problem_type == "single_label_classification" and config.num_labels == 1:
        expected = "two labels or more, or problem_type='regression'"
        text = f"num_labels=1 with problem_type={config.problem_type!r} is not supported (expected {expected})"
        errors.append(FieldError(text))
    return errors


def resolve_aliases(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Rename older spellings (`ALIASES`). Both spellings may be passed if they agree."""
    resolved, errors = dict(fields), []
    for alias, name in ALIASES.items():
        old = resolved.pop(alias, None)
        new = resolved.get(name)
        if old is None:
            continue
        if new is None:
            resolved[name] = old
        elif _comparable(name, old) != _comparable(name, new):
            errors.append(FieldError(f"{describe(alias, old)} contradicts {describe(name, new)}; pass one of them"))
    return resolved, errors


def _comparable(name: str, value: Any) -> Any:
    return to_list(RULES[name].coerce(value) if name in RULES else value)


def default_labels(count: int) -> dict[int, str]:
    return {index: f"LABEL_{index}" for index in range(count)}


def resolve_labels(
    num_labels: Any = None, id2label: Any = None, label2id: Any = None
) -> tuple[dict[int, str], dict[str, int], list[FieldError]]:
    """Build both label maps from any of the three fields.

    Names may repeat (ImageNet-1k has two classes "crane"). `label2id` then contains one index of that name. Indices
    may have gaps, as those of the hub's BEiT for ImageNet-22k, but they start at 0.

    Returns:
        `id2label`, `label2id` and the errors, which include contradictions.
    """
    errors: list[FieldError] = []
    count = to_integer(num_labels)
    if count is not None and (count_error := COUNT.error("num_labels", count)):
        return {}, {}, [count_error]
    names = _map_from_json(id2label, "id2label", errors)
    indices = _map_from_json(label2id, "label2id", errors)
    if errors:
        return {}, {}, errors
    if names is None:
        names = default_labels(2 if count is None else count) if indices is None else _names(indices)
    if indices is None:
        indices = _indices(names)
    if count is not None and count != len(names):
        given = "id2label" if id2label is not None else "label2id"
        errors.append(FieldError(f"num_labels={count} contradicts {given} of length {len(names)}; pass one of them"))
    if names and min(names) != 0:
        given = "id2label" if id2label is not None else "label2id"
        value = names if id2label is not None else indices
        errors.append(FieldError(f"{describe(given, value)} starts at {min(names)} (expected class indices from 0)"))
    if not labels_agree(names, indices):
        reason = (
            "maps several labels to one index" if id2label is None else f"contradicts {describe('id2label', names)}"
        )
        errors.append(FieldError(f"{describe('label2id', indices)} {reason}"))
    return ({}, {}, errors) if errors else (names, indices, [])


def labels_agree(id2label: dict[int, str], label2id: dict[str, int]) -> bool:
    """Return whether both label maps have the same names.

    Each index in `label2id` must also have the same name in `id2label`.
    """
    same_names = set(id2label.values()) == set(label2id)
    return same_names and all(id2label.get(index) == name for name, index in label2id.items())


def _names(label2id: Mapping[str, int]) -> dict[int, str]:
    return dict(sorted((index, name) for name, index in label2id.items()))


def _indices(id2label: Mapping[int, str]) -> dict[str, int]:
    return {name: index for index, name in sorted(id2label.items())}


def _map_from_json(labels: Any, field: str, errors: list[FieldError]) -> dict[Any, Any] | None:
    """Convert the indices of a label map to int; JSON has strings. Append errors to `errors`."""
    if labels is None:
        return None
    expected = "a dict of int to string" if field == "id2label" else "a dict of string to int"
    if not isinstance(labels, Mapping):
        text = f"{describe(field, labels)} is of type {type(labels).__name__} (expected {expected})"
        errors.append(FieldError(text, wrong_type=True))
        return None
    pairs = labels.items() if field == "id2label" else [(index, name) for name, index in labels.items()]
    indexed = [(_index_from_json(index), name) for index, name in pairs]
    if not all(is_integer(index) and isinstance(name, str) for index, name in indexed):
        text = f"{describe(field, labels)} is not supported (expected {expected})"
        errors.append(FieldError(text, wrong_type=True))
        return None
    return dict(indexed) if field == "id2label" else {name: index for index, name in indexed}


def _index_from_json(index: Any) -> Any:
    if isinstance(index, str) and index.removeprefix("-").isdecimal():
        return int(index)
    return to_integer(index)


def resolve_stages(
    stage_names: Sequence[str], out_features: Any, out_indices: Any
) -> tuple[list[int] | None, list[FieldError]]:
    """Return the indices of the selected stages and the errors.

    The indices are None if no stages are selected.
    """
    indices = to_list(out_indices)
    features = to_list(out_features)
    errors = []
    if features is not None:
        errors += _feature_errors(stage_names, features)
    if indices is not None:
        errors += _index_errors(stage_names, indices)
    if errors or (features is None and indices is None):
        return None, errors
    if indices is None:
        return [list(stage_names).index(name) for name in features], []
    if features is not None and features != [stage_names[index] for index in indices]:
        return None, [FieldError(f"{describe('out_features', features)} and {indices=} select different stages")]
    return list(map(int, indices)), []


def _feature_errors(stage_names: Sequence[str], features: Any) -> list[FieldError]:
    expected = f"(expected None or some of {', '.join(stage_names)}, in this order, each once)"
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        text = f"out_features={reprlib.repr(features)} is not a list of strings {expected}"
        return [FieldError(text, wrong_type=True)]
    if features and features == [name for name in stage_names if name in features]:
        return []
    return [FieldError(f"out_features={features} is not supported {expected}")]


def _index_errors(stage_names: Sequence[str], indices: Any) -> list[FieldError]:
    count = len(stage_names)
    expected = f"(expected None or indices from {-count} to {count - 1}, in the order of the stages, each once)"
    if not isinstance(indices, list) or not all(is_integer(to_integer(index)) for index in indices):
        text = f"out_indices={reprlib.repr(indices)} is not a list of ints {expected}"
        return [FieldError(text, wrong_type=True)]
    in_range = all(-count <= index < count for index in indices)
    positions = [index % count for index in indices]
    if indices and in_range and positions == sorted(set(positions)):
        return []
    return [FieldError(f"out_indices={indices} is not supported {expected}")]


def merge_overrides(
    values: Mapping[str, Any], overrides: Mapping[str, Any], default_depth: int
) -> tuple[dict[str, Any], list[FieldError]]:
    """Apply `overrides` to the fields of a saved configuration.

    Saved files also contain derived fields: the names of the stages, the default stage, both label maps. An
    override of a label or stage field therefore replaces its whole group. `num_labels` keeps the saved names if
    their number is the same. As in Transformers, `id2label` takes precedence over `label2id` and `num_labels`.

    Returns:
        The fields and the errors.
    """
    saved = dict(values)
    if saved.get("dtype") is not None:
        saved.pop("torch_dtype", None)  # Transformers writes one of them, and reads the new name if there are both
    merged, errors = resolve_aliases(saved)
    _remove_stale_values(merged, default_depth)
    changes, more_errors = resolve_aliases(overrides)
    if any(name in changes for name in STAGE_FIELDS):
        _remove(merged, STAGE_FIELDS)
    saved_names = merged.get("id2label")
    if any(name in changes for name in LABEL_FIELDS):
        _remove(merged, LABEL_FIELDS)
        only_count = "id2label" not in changes and "label2id" not in changes
        if only_count and isinstance(saved_names, Mapping) and len(saved_names) == changes["num_labels"]:
            merged["id2label"] = saved_names
    return merged | changes, errors + more_errors


def _remove_stale_values(values: dict[str, Any], default_depth: int) -> None:
    _remove(values, ("stage_names",))
    depth = values.get("num_hidden_layers", default_depth)
    selected = to_list(values.get("out_indices")), to_list(values.get("out_features"))
    if selected in (([depth], [f"stage{depth}"]), ([depth], None), (None, [f"stage{depth}"])):
        _remove(values, STAGE_FIELDS)
    errors: list[FieldError] = []
    names = _map_from_json(values.get("id2label"), "id2label", errors)
    indices = _map_from_json(values.get("label2id"), "label2id", errors)
    if names is not None and indices is not None and not labels_agree(names, indices):
        _remove(values, ("label2id",))
    if names is not None and values.get("num_labels") != len(names):
        _remove(values, ("num_labels",))


def _remove(values: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        values.pop(name, None)


class LabelsAndStages(SingleConfig):
    """Labels and stages of a `BeitConfig`. Setting a field updates the fields that depend on it."""

    num_hidden_layers: int
    _id2label: dict[int, str]
    _label2id: dict[str, int]
    _out_indices: list[int] | None

    @property
    def num_labels(self) -> int:
        """Number of classes. Setting another number renames the classes to LABEL_0, LABEL_1, ..."""
        return len(self._id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != self.num_labels:
            self._set_labels({}, num_labels=count)

    @property
    def id2label(self) -> dict[int, str]:
        """Class index to name. Setting it rebuilds `label2id` if that disagrees."""
        return self._id2label

    @id2label.setter
    def id2label(self, id2label: Mapping[int, str]) -> None:
        self._set_labels({"label2id": self._label2id}, id2label=id2label)

    @property
    def label2id(self) -> dict[str, int]:
        """Class name to index. Setting it rebuilds `id2label` if that disagrees."""
        return self._label2id

    @label2id.setter
    def label2id(self, label2id: Mapping[str, int]) -> None:
        self._set_labels({"id2label": self._id2label}, label2id=label2id)

    def _set_labels(self, kept: dict[str, Any], **given: Any) -> None:
        names, indices, errors = resolve_labels(**given, **kept)
        if errors:
            names, indices, errors = resolve_labels(**given)
        raise_errors(type(self).__name__, errors)
        self._id2label, self._label2id = names, indices

    @property
    def stage_names(self) -> list[str]:
        """Names of the outputs: "stem" for the embeddings, "stage1" and so on for the blocks."""
        return ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]

    @property
    def out_indices(self) -> list[int]:
        """Indices of the stages that the backbone returns. Setting them sets the names. None resets both."""
        return [self.num_hidden_layers] if self._out_indices is None else list(self._out_indices)

    @out_indices.setter
    def out_indices(self, out_indices: Any) -> None:
        self._select_stages(out_features=None, out_indices=out_indices)

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that the backbone returns. Setting them sets the indices. None resets both."""
        return [self.stage_names[index] for index in self.out_indices]

    @out_features.setter
    def out_features(self, out_features: Any) -> None:
        self._select_stages(out_features=out_features, out_indices=None)

    def _select_stages(self, out_features: Any, out_indices: Any) -> None:
        selected, errors = resolve_stages(self.stage_names, out_features, out_indices)
        raise_errors(type(self).__name__, errors)
        self._out_indices = selected
