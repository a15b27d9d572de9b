"""Outputs of the models: named tensors, also a tuple, a dict and a pytree."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NoReturn, dataclass_transform

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass_transform(eq_default=False)
class ModelOutput(OrderedDict[str, Any]):
    """Base of the model outputs. A subclass lists annotated fields with the default None.

    A field that is None is absent from the keys, the items, the length and the tuple. The other fields keep the order
    of the class.

    - `output.logits`, `output["logits"]`, `output[1]`, `output[:2]` and `output.to_tuple()` read fields;
    - `output.logits = x` and `output["logits"] = x` set a field; None removes it;
    - `Output({"logits": x})` and `Output(pairs)` build one from a mapping or from (name, value) pairs, as
      `torch.nn.parallel.gather` and Accelerate do.

    Iterating gives the keys, as for any dict; unpack with `loss, logits = output.to_tuple()`. Subclasses are
    dataclasses and pytree nodes (serialized under `module.ClassName`).
    `torch.jit.trace(strict=False)` converts an output to a dict, which must have values of one type. Pass
    `return_dict=False` if hidden states or attentions are requested.

    Two fields mean the same in every output here (B images, N = 1 + patches tokens, E channels, H heads):

    - hidden_states: `num_hidden_layers + 1` tensors `[B, N, E]`, the embeddings, then each block's output;
    - attentions: `num_hidden_layers` tensors `[B, H, N, N]`, each block's attention weights after dropout.
    """

    _field_names: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(cls, repr=False, eq=False)
        for name in ("__eq__", "__repr__"):  # pin both methods: a second @dataclass would replace them
            setattr(cls, name, getattr(cls, name))
        cls._field_names = tuple(field.name for field in fields(cls))  # type: ignore[arg-type]
        required = [field.name for field in fields(cls) if field.default is not None]  # type: ignore[arg-type]
        if required or not cls._field_names:
            raise TypeError(
                f"{cls.__name__} lists the fields {list(cls._field_names)}: an output needs at least one, "
                f"and each needs the default None; without it: {required}"
            )
        _register_pytree_node(cls)

    def __post_init__(self) -> None:
        first_name, *other_names = self._field_names
        first = getattr(self, first_name)
        if any(getattr(self, name) is not None for name in other_names) or not _holds_fields(first):
            return
        super().__setattr__(first_name, None)
        super().pop(first_name)
        pairs = list(first.items() if isinstance(first, dict) else first)
        if not all(map(_is_pair, pairs)):
            raise TypeError(f"{type(self).__name__} takes a mapping or (name, value) pairs, not an iterator of {pairs}")
        for name, value in pairs:
            self[name] = value

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{type(self).__name__} holds {list(self)}, not {key!r}")
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self._field_names:
            raise KeyError(
                f"{type(self).__name__} has the fields {list(self._field_names)}, not {key!r} (for a pipeline of "
                "Transformers, pass the model to beit_fast.integrations.transformers.with_transformers_outputs first)"
            )
        setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._field_names:
            raise AttributeError(f"{type(self).__name__} has the fields {list(self._field_names)}, not {name!r}")
        super().__setattr__(name, value)
        is_new = name not in self
        if value is not None:
            super().__setitem__(name, value)
            if is_new:
                self._move_later_fields_behind(name)
        elif not is_new:
            super().pop(name)

    def _move_later_fields_behind(self, name: str) -> None:
        position = self._field_names.index(name)
        for later in self._field_names[position + 1 :]:
            if later in self:
                super().__setitem__(later, super().pop(later))

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())

    def _raise_unsupported(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            f"the fields of a {type(self).__name__} are fixed: set one with `output.name = value` or None; "
            "del, clear, move_to_end, pop, popitem, setdefault, update and |= are not supported"
        )

    __delattr__ = __delitem__ = clear = move_to_end = pop = popitem = setdefault = update = __ior__ = _raise_unsupported

    def __eq__(self, other: object) -> bool:
        """Compare class, fields and values. Tensors are compared by shape, dtype, device and elements."""
        return type(self) is type(other) and _equal(dict(self), dict(other))

    __hash__ = None  # type: ignore[assignment]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_summary(value)}' for name, value in self.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _holds_fields(value: Any) -> bool:
    """Whether the only argument holds fields, as a mapping or as pairs. Otherwise it is the first field."""
    if isinstance(value, (dict, Iterator)):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_pair, value))


def _is_pair(element: Any) -> bool:
    return isinstance(element, (list, tuple)) and len(element) == 2 and isinstance(element[0], str)


def _equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
        return alike and not first.is_meta and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return bool(first == second)


def _summary(value: Any) -> str:
    if isinstance(value, Tensor) and value.dim() > 0:
        device = "" if value.device.type == "cpu" else f", {value.device}"
        return f"Tensor({list(value.shape)}, {str(value.dtype).removeprefix('torch.')}{device})"
    if isinstance(value, (list, tuple)):
        opening, closing = "()" if isinstance(value, tuple) else "[]"
        return opening + ", ".join(map(_summary, value)) + closing
    return repr(value)


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output.keys())


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[str]]:
    names = list(output.keys())
    return [(pytree.MappingKey(name), output[name]) for name in names], names


def _register_pytree_node(cls: type[ModelOutput]) -> None:
    def unflatten(values: Iterable[Any], names: list[str]) -> ModelOutput:
        output = cls()
        for name, value in zip(names, values, strict=True):
            setattr(output, name, value)
        return output

    pytree.register_pytree_node(
        cls,
        _flatten,
        unflatten,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        flatten_with_keys_fn=_flatten_with_keys,
    )


class BaseModelOutput(ModelOutput):
    """The encoder's output, without pooling.

    Attributes:
        last_hidden_state: `[B, N, E]`, tokens after the last block and the trunk's LayerNorm if it has one;
            token 0 is CLS.
        hidden_states, attentions: as in `ModelOutput`.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BeitModelOutputWithPooling(ModelOutput):
    """The output of `BeitModel`.

    Attributes:
        last_hidden_state: `[B, N, E]`, tokens after the last block and the trunk's LayerNorm if it has one;
            token 0 is CLS.
        pooler_output: `[B, E]`, the normalized mean of the patch tokens, or CLS without mean pooling.
        hidden_states, attentions: as in `ModelOutput`.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MaskedLMOutput(ModelOutput):
    """The output of `BeitForMaskedImageModeling`.

    Attributes:
        loss: scalar, cross entropy over the masked patches; present when labels were given.
        logits: `[B, P, vocab_size]`, scores of the visual tokens for each of the P patches (equation 1).
        hidden_states, attentions: as in `ModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ImageClassifierOutput(ModelOutput):
    """The output of `BeitForImageClassification`.

    Attributes:
        loss: scalar, by `config.problem_type`; present when labels were given.
        logits: `[B, num_labels]`, scores before softmax.
        hidden_states, attentions: as in `ModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class SemanticSegmenterOutput(ModelOutput):
    """The output of `BeitForSemanticSegmentation`.

    Attributes:
        loss: scalar, cross entropy at the labels' size plus the weighted auxiliary loss; present with labels.
        logits: `[B, num_labels, h, w]`, scores before softmax at the decoder's size, not the image's.
        hidden_states, attentions: as in `ModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BackboneOutput(ModelOutput):
    """The output of `BeitBackbone`.

    Attributes:
        feature_maps: one tensor for each of `out_features`: `[B, E, h, w]`, or `[B, N, E]` with CLS first
            when `reshape_hidden_states` is False.
        hidden_states, attentions: as in `ModelOutput`.
    """

    feature_maps: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
