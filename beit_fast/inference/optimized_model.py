"""`optimize_for_inference`: a model with folded blocks and packed weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from ..layers.embeddings import check_pixel_shape, window_of
from ..models.base import BeitPreTrainedModel
from ..ops.dispatch import attention
from ..position_bias import token_count
from ..utils.dtypes import find_dtype
from ..utils.messages import count_of, join_choices
from ..utils.names import DTYPE_ALIASES, AttentionImplementation
from .compilation import raise_if_compiling
from .cuda_graphs import GraphCache, GraphReport
from .encoder import FoldedEncoder
from .folding import folding_errors, packed_weight_errors, parameter_errors

Model = TypeVar("Model", bound=BeitPreTrainedModel)


def optimize_for_inference(
    model: Model,
    dtype: torch.dtype | str | None = None,
    example: Tensor | None = None,
    *,
    graphs: bool = True,
    keep_original: bool = True,
) -> Model:
    """Return a faster model with the same class, signature and outputs.

    The model is for inference only. Layer scales, the gain and shift of LayerNorm and the softmax scale are folded into
    the linear layers, in fp32 and rounded once. Query, key and value become one projection. Bias tables are resized
    once per window. On a CPU, weights are packed for oneDNN, which fuses GELU and residuals. On CUDA, residual and
    LayerNorm are one kernel, GELU is fused into the linear layer, and calls are captured as CUDA graphs.

    The result copies the weights; later changes to `model` have no effect. Moving it, training it or loading weights
    into it raises an error. `state_dict` and `save_pretrained` return and write the original weights.

    Args:
        model: a model of this package; it is not changed.
        dtype: dtype of weights and arithmetic, or its name, such as `"bfloat16"` or `"bf16"` (default: the model's).
            Bias tables stay fp32.
        example: pixels `[B, C, H, W]` like those of later calls. Weights are packed for their number of tokens, and one
            call fills the caches. Other sizes work too; their first call is slower.
        graphs: on CUDA, capture a graph for each of the last 8 shapes and replay it. Calls with labels or several
            positional arguments are not captured. False launches every kernel in every call.
        keep_original: False moves the parameters of `model` to the meta device to free their memory. The result can
            then not be saved.

    Raises:
        TypeError: If `model` is not a model of this package, or `dtype` is not a floating-point dtype.
        ValueError: If `model` is already optimized, or has adapters, quantized layers or hooks. Every reason is listed,
            and `model` does not change.
    """
    requested = _check(model, dtype)
    encoder: Any = model.base_model.encoder
    resolved = model.dtype if requested is None else requested
    folded = FoldedEncoder(encoder, resolved, _rows(model, example))
    result: Any = copy.deepcopy(model, {id(encoder): folded}).to(resolved).eval().requires_grad_(False)
    result.__class__ = _optimized_class(type(model))  # type: ignore[arg-type]
    result._finish_optimization(model, resolved, graphs)
    if example is not None:
        result(example.to(result.device))
    if not keep_original:
        result._free_original()
    return result


def _check(model: Any, dtype: Any) -> torch.dtype | None:
    """Raise if the model cannot be optimized; return the requested dtype."""
    if not isinstance(model, BeitPreTrainedModel):
        raise TypeError(f"{type(model).__name__} is not supported (expected a model of beit_fast)")
    if isinstance(model, OptimizedModel):
        raise ValueError("this model is already optimized; pass the model that it was made from")
    requested = _dtype_of(dtype)
    trunk = model.base_model
    name = "encoder" if trunk is model else f"{model.base_model_prefix}.encoder"
    errors = folding_errors(getattr(trunk, "encoder", model), name)
    errors += packed_weight_errors(model, name) + parameter_errors(model)
    if errors:
        raise ValueError(
            f"{type(model).__name__} cannot be optimized: {'; '.join(errors)}. Merge adapters and remove hooks first, "
            "and optimize a model before it is quantized or sharded."
        )
    return requested


def _dtype_of(dtype: Any) -> torch.dtype | None:
    """Resolve a dtype or its name, with or without `torch.`.

    Raises:
        TypeError: If it is neither a floating-point dtype nor a name of one.
    """
    if dtype is None:
        return None
    resolved = find_dtype(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise TypeError(
            f"dtype={dtype!r} is not supported (expected a floating-point torch.dtype, its name, "
            f"{join_choices(DTYPE_ALIASES)}, or None)"
        )
    return resolved


def _rows(model: BeitPreTrainedModel, example: Tensor | None) -> int:
    """Return the number of tokens in the example's batch.

    If there is no example, return that of one image of the native size.
    """
    if example is None:
        return token_count(model.config.window)
    if not isinstance(example, Tensor) or example.ndim != 4:
        given = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be pixels [batch, channels, height, width], not {given}")
    check_pixel_shape(example, model.config.num_channels)
    return max(example.shape[0], 1) * token_count(window_of(example, model.config.patch_size))


@functools.cache
def _optimized_class(base: Any) -> type[BeitPreTrainedModel]:
    """Make a subclass of `base` for inference; its forward has the signature of the base."""

    @functools.wraps(base.forward)
    def forward(self: OptimizedModel, *args: Any, **kwargs: Any) -> Any:
        return self._infer(args, kwargs)

    return type(
        f"Optimized{base.__name__}", (OptimizedModel, base), {"forward": forward, "__doc__": OptimizedModel.__doc__}
    )


@dataclass(frozen=True)
class InferenceReport:
    """Libraries and memory of an optimized model; `str()` returns a readable summary.

    Attributes:
        dtype: dtype of weights and arithmetic.
        linears: the libraries of the linear layers in the blocks, such as `"onednn"` or `"torch"`.
        original_bytes: bytes of the original's parameters; 0 if they were freed.
        optimized_bytes: bytes of the result's weights, with its copies of embeddings and head.
        windows: the number of windows with cached biases.
    """

    dtype: torch.dtype
    linears: str
    original_bytes: int
    optimized_bytes: int
    windows: int

    def __str__(self) -> str:
        megabytes = [f"{count / 2**20:.0f} MiB" for count in (self.optimized_bytes, self.original_bytes)]
        return (
            f"optimized for inference in {str(self.dtype).removeprefix('torch.')}: {self.linears} linear layers, "
            f"{megabytes[0]} of weights beside {megabytes[1]} of the original, "
            f"cached biases of {count_of(self.windows, 'window')}"
        )


class OptimizedModel(BeitPreTrainedModel):
    """A model made by `beit_fast.optimize_for_inference`, for inference only."""

    _original: BeitPreTrainedModel | None
    _function: Callable[..., Any]
    _graphs: GraphCache | None
    _optimized_dtype: torch.dtype

    def _finish_optimization(self, original: BeitPreTrainedModel, dtype: torch.dtype, graphs: bool) -> None:
        vars(self)["_original"] = original  # not a submodule: its parameters are not those of this model
        self._optimized_dtype = dtype
        self._use_graphs = graphs
        function = functools.partial(type(original).forward, self)
        self._function = function
        self._graphs = None
        if graphs and self.device.type == "cuda":
            self._graphs = GraphCache(function, held=self._folded_encoder.biases.held)
        self._parameter_counts = {flag: original.num_parameters(flag) for flag in (False, True)}

    @torch.no_grad()
    def _infer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise_if_compiling()
        # A loss may select masked patches, which synchronizes and cannot be captured.
        graphs = self._graphs if len(args) < 2 and kwargs.get("labels") is None else None
        function = self._function if graphs is None else graphs
        device = self.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    def graph_report(self) -> GraphReport | None:
        """Return the CUDA graphs and counts of calls; None if calls are not captured."""
        return None if self._graphs is None else self._graphs.report()

    def inference_report(self) -> InferenceReport:
        """Return the libraries and memory of this model."""
        encoder = self._folded_encoder
        libraries = sorted({linear.library for linear in encoder.linears()})
        own = sum(p.numel() * p.element_size() for p in self.parameters()) + encoder.weight_bytes()
        original = self._original
        kept = 0 if original is None else sum(p.numel() * p.element_size() for p in original.parameters())
        return InferenceReport(self._optimized_dtype, ", ".join(libraries), kept, own, len(encoder.biases))

    @property
    def _folded_encoder(self) -> FoldedEncoder:
        encoder: Any = self.base_model.encoder
        return encoder

    def attention_report(self) -> attention.AttentionReport:
        """Return the attention kernel that ran in each block.

        The report also has the reasons why other kernels cannot run.
        """
        kernels = [block.last_kernel for block in self._folded_encoder.blocks()]
        head_dim = self.config.attention_head_dim
        return attention.report(self.attn_implementation, kernels, self.device, self._optimized_dtype, head_dim)

    def set_attn_implementation(self, attn_implementation: AttentionImplementation | None) -> None:
        """Choose the attention implementation of every block from now on.

        The choices are `"eager"`, `"sdpa"`, `"triton"` and None (by device and dtype).
        """
        super().set_attn_implementation(attn_implementation)
        if self._graphs is not None:
            self._graphs.clear()
        self._folded_encoder.set_attn_implementation(attn_implementation)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the original's parameters; `only_trainable` counts those that require gradients there."""
        return self._parameter_counts[only_trainable]

    def train(self, mode: bool = True) -> Self:
        """Support evaluation mode only; `mode=True` raises RuntimeError."""
        return _raise_unsupported("be trained", "train the model that it was made from") if mode else self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise RuntimeError: the weights are folded."""
        _raise_unsupported("load weights", "load them into the model that it was made from")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.load_state_dict()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Allow a move to the present device and dtype; raise RuntimeError for any other."""
        probe = torch.empty(0, dtype=self._optimized_dtype, device=self.device)
        moved = fn(probe)
        if (moved.device, moved.dtype) != (probe.device, probe.dtype):
            _raise_unsupported(
                f"be moved from {probe.dtype} on {probe.device} to {moved.dtype} on {moved.device}",
                "move the model that it was made from, or pass dtype=",
            )
        return self

    def to_empty(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise RuntimeError: the weights are folded."""
        _raise_unsupported("be emptied", "empty the model that it was made from")

    def share_memory(self) -> NoReturn:
        """Raise RuntimeError: packed weights cannot be shared."""
        _raise_unsupported("be shared", "share the model that it was made from")

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise RuntimeError: there is no backward pass."""
        _raise_unsupported("be trained", "train the model that it was made from")

    def init_weights(self) -> NoReturn:
        """Raise RuntimeError: the weights are folded."""
        _raise_unsupported("be initialized", "initialize the model that it was made from")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the original's `state_dict`; RuntimeError if it was freed."""
        return self._kept_original("state_dict").state_dict(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the original, see `BeitPreTrainedModel.save_pretrained`; RuntimeError if it was freed."""
        self._kept_original("save_pretrained").save_pretrained(save_directory, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        original = self._kept_original("a copy or a pickle")
        return functools.partial(optimize_for_inference, graphs=self._use_graphs), (original, self._optimized_dtype)

    def _kept_original(self, purpose: str) -> BeitPreTrainedModel:
        if self._original is None:
            raise RuntimeError(
                f"{purpose} needs the original weights, which keep_original=False freed; save the model first"
            )
        return self._original

    def _free_original(self) -> None:
        self._kept_original("freeing").to("meta")
        vars(self)["_original"] = None


def _raise_unsupported(what: str, instead: str) -> NoReturn:
    raise RuntimeError(f"an optimized model cannot {what}: {instead}, and call beit_fast.optimize_for_inference again")
