"""`optimize_for_inference`: a model with the same forward, its blocks folded, its weights laid out for the machine."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from ..layers.embeddings import window_of
from ..models.base import BeitPreTrainedModel
from ..ops.dispatch import attention
from ..position_bias import token_count
from .cuda_graphs import GraphCache, GraphReport
from .encoder import FoldedEncoder
from .folding import obstacles_to_folding


def optimize_for_inference(
    model: BeitPreTrainedModel,
    dtype: torch.dtype | None = None,
    example: Tensor | None = None,
    *,
    graphs: bool = True,
    keep_original: bool = True,
) -> Any:
    """A model of the same class, signature and outputs that is fast and only infers.

    Layer scales, the gain and shift of LayerNorm and the softmax scale are folded into the linear layers (exactly: in
    fp32, rounded once), query, key and value become one projection, and bias tables are resized once for each window.
    On a CPU weights are packed for oneDNN, which also computes GELU and adds residuals; on CUDA residuals are added in
    one kernel with LayerNorm, GELU is part of the linear layer, and calls are recorded as CUDA graphs.

    The result owns its weights and computes without gradients. It sees no later change of `model`. Moving it, training
    it or loading weights into it raises an error; `state_dict` and `save_pretrained` give the originals.

    Args:
        model: any model of this package, in evaluation or training mode; it is not changed.
        dtype: of the result's weights and arithmetic, the model's own by default. Bias tables stay fp32.
        example: pixels `[B, C, H, W]` like those to come. Weights are packed for as many tokens, and one call prepares
            all that is kept for such pixels. Others work as well, the first call of each size being slower.
        graphs: on CUDA, record calls of each shape as a graph and replay it, for the last 8 shapes; calls with labels
            or several positional arguments are never recorded. False launches every kernel in every call.
        keep_original: False frees the memory of `model`, whose parameters then lie on the meta device; the result
            cannot write them any more.

    Raises:
        TypeError: `model` is none of this package's, or `dtype` is no floating-point type.
        ValueError: `model` is optimised already, or something stands in the way, such as adapters, quantised layers or
            hooks; every reason is listed. `model` is left as it was.
    """
    _check(model, dtype)
    encoder: Any = model.base_model.encoder
    resolved = model.dtype if dtype is None else dtype
    folded = FoldedEncoder(encoder, resolved, _rows(model, example))
    result: Any = copy.deepcopy(model, {id(encoder): folded}).to(resolved).eval().requires_grad_(False)
    result.__class__ = _optimized_class(type(model))  # type: ignore[arg-type]
    result._finish_optimization(model, resolved, graphs)
    if example is not None:
        result(example.to(result.device))
    if not keep_original:
        result._free_original()
    return result


def _check(model: Any, dtype: torch.dtype | None) -> None:
    if not isinstance(model, BeitPreTrainedModel):
        raise TypeError(f"optimize_for_inference takes a model of beit_fast, not a {type(model).__name__}")
    if isinstance(model, OptimizedModel):
        raise ValueError("this model is optimised already; give the one that it was made from")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, not {dtype!r}")
    reasons = obstacles_to_folding(getattr(model.base_model, "encoder", model))
    if reasons:
        raise ValueError(
            f"{type(model).__name__} cannot be optimised: {'; '.join(reasons)}. Merge adapters and remove hooks first."
        )


def _rows(model: BeitPreTrainedModel, example: Tensor | None) -> int:
    """Tokens of the example's batch, or of one image of the model's own size."""
    if example is None:
        return token_count(model.config.window)
    if not isinstance(example, Tensor) or example.ndim != 4:
        given = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be pixels [batch, channels, height, width], not {given}")
    return max(example.shape[0], 1) * token_count(window_of(example, model.config.patch_size))


@functools.cache
def _optimized_class(base: Any) -> type[BeitPreTrainedModel]:
    """A subclass of `base` that only infers; its forward has the base's signature."""

    @functools.wraps(base.forward)
    def forward(self: OptimizedModel, *args: Any, **kwargs: Any) -> Any:
        return self._infer(args, kwargs)

    return type(
        f"Optimized{base.__name__}", (OptimizedModel, base), {"forward": forward, "__doc__": OptimizedModel.__doc__}
    )


@dataclass(frozen=True)
class InferenceReport:
    """What an optimised model holds and runs; `str()` is for people.

    Attributes:
        dtype: of weights and arithmetic.
        linears: the library of the linear layers in the blocks: `"onednn"`, `"torch"`, ...
        original_bytes: parameters of the original; 0 where they were freed.
        optimized_bytes: weights of the result, its own copies of embeddings and head included.
        windows: how many windows have their biases at hand.
    """

    dtype: torch.dtype
    linears: str
    original_bytes: int
    optimized_bytes: int
    windows: int

    def __str__(self) -> str:
        megabytes = [f"{count / 2**20:.0f} MiB" for count in (self.optimized_bytes, self.original_bytes)]
        return (
            f"optimised for inference in {str(self.dtype).removeprefix('torch.')}: {self.linears} linear layers, "
            f"{megabytes[0]} of weights beside {megabytes[1]} of the original, biases of {self.windows} windows at hand"
        )


class OptimizedModel(BeitPreTrainedModel):
    """A model made by `beit_fast.optimize_for_inference`: it infers, and does nothing else."""

    _original: BeitPreTrainedModel | None
    _function: Callable[..., Any]
    _graphs: GraphCache | None
    _optimized_dtype: torch.dtype

    def _finish_optimization(self, original: BeitPreTrainedModel, dtype: torch.dtype, graphs: bool) -> None:
        vars(self)["_original"] = original  # no submodule: its parameters are not this model's
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
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "an optimised model is not for torch.compile or torch.export: give them the model it was made from"
            )
        # A loss may choose masked patches, which waits for the device and cannot be recorded.
        graphs = self._graphs if len(args) < 2 and kwargs.get("labels") is None else None
        function = self._function if graphs is None else graphs
        device = self.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    def graph_report(self) -> GraphReport | None:
        """What CUDA graphs are kept and how calls went; None where calls are not recorded."""
        return None if self._graphs is None else self._graphs.report()

    def inference_report(self) -> InferenceReport:
        """What this model holds and runs."""
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
        """Which attention kernel ran in each block, and why others cannot serve here."""
        kernels = [block.last_kernel for block in self._folded_encoder.blocks()]
        head_dim = self.config.attention_head_dim
        return attention.report(self.attn_implementation, kernels, self.device, self._optimized_dtype, head_dim)

    def set_attn_implementation(self, attn_implementation: str | None) -> None:
        """Choose `"eager"`, `"sdpa"`, `"triton"` or None (by device and dtype) for every block from now on."""
        super().set_attn_implementation(attn_implementation)
        if self._graphs is not None:
            self._graphs.clear()
        self._folded_encoder.set_attn_implementation(attn_implementation)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the original's parameters hold; only_trainable: those that are trained there."""
        return self._parameter_counts[only_trainable]

    def train(self, mode: bool = True) -> Self:
        """Evaluation mode only: True raises."""
        return _refuse("be trained", "train the model that it was made from") if mode else self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: the weights are folded."""
        _refuse("load weights", "load them into the model that it was made from")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.load_state_dict()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """A move to where and what the model is already changes nothing; any other raises."""
        probe = torch.empty(0, dtype=self._optimized_dtype, device=self.device)
        moved = fn(probe)
        if (moved.device, moved.dtype) != (probe.device, probe.dtype):
            _refuse(
                f"be moved from {probe.dtype} on {probe.device} to {moved.dtype} on {moved.device}",
                "move the model that it was made from, or give dtype=",
            )
        return self

    def to_empty(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: the weights are folded."""
        _refuse("be emptied", "empty the model that it was made from")

    def share_memory(self) -> NoReturn:
        """Raises: packed weights cannot be shared."""
        _refuse("be shared", "share the model that it was made from")

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> NoReturn:
        """Raises: there is no backward pass."""
        _refuse("be trained", "train the model that it was made from")

    def init_weights(self) -> NoReturn:
        """Raises: the weights are folded."""
        _refuse("be initialised", "initialise the model that it was made from")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's `state_dict`; RuntimeError where it was freed."""
        return self._kept_original("state_dict").state_dict(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write the original, see `BeitPreTrainedModel.save_pretrained`; RuntimeError where it was freed."""
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


def _refuse(what: str, instead: str) -> NoReturn:
    raise RuntimeError(f"an optimised model cannot {what}: {instead}, and call beit_fast.optimize_for_inference again")
