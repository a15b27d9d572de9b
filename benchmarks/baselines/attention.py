"""The attention baselines, and the reasons why one cannot run a case."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit_fast.layers.attention_backends import run_attention
from beit_fast.ops.dispatch import attention
from beit_fast.position_bias import gather_bias, relative_position_index, table_rows

from ..harness.cases import BACKWARD, Case, Inputs, draw, results_of

Attention = Callable[[], Tensor]
"""A forward over bound inputs, which returns a contiguous `[B, N, H, D]` as a model needs it."""


PACKAGES = {
    "cpu": ("transformers", "timm", "onnx", "onnxruntime", "openvino"),
    "cuda": ("transformers", "timm"),
}
"""Packages that the baselines of all benchmarks need, by device."""


def not_installed(packages: Sequence[str]) -> list[str]:
    """Return the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _always_available(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Baseline:
    """One implementation of attention.

    Attributes:
        name: Unique name.
        what: Description in one line.
        build: Binds a case and its inputs to a function.
        kernel: Returns the name of the kernel that runs.
        missing_reason: Returns why it cannot run a case, or None.
        biased: Whether it adds the relative position bias.
        learnable: Whether it can train the table.
        compiles: Whether building it compiles for long on a CPU.
    """

    name: str
    what: str
    build: Callable[[Case, Inputs], Attention]
    kernel: Callable[[Case], str]
    missing_reason: Callable[[Case], str | None] = _always_available
    biased: bool = True
    learnable: bool = True
    compiles: bool = False

    def __str__(self) -> str:
        return self.name


def _ours(implementation: str, biased: bool = True) -> Baseline:
    what = {
        "triton": "reads the bias inside the kernel" if biased else "the same kernel without its bias",
        "eager": "gathered bias, matrix products and softmax",
        "sdpa": "SDPA with a gathered bias",
    }

    def build(case: Case, inputs: Inputs) -> Attention:
        return functools.partial(
            run_attention,
            implementation,
            inputs.q,
            inputs.k,
            inputs.v,
            table=inputs.table if biased else None,
            window=case.window,
            scale=case.scale,
        )

    def kernel(case: Case) -> str:
        return attention.kernel_name(implementation, torch.device(case.device), case.dtype, case.head_dim)

    def missing_reason(case: Case) -> str | None:
        return "measures the cost of the bias in the CUDA kernel" if not biased and case.device == "cpu" else None

    name = f"beit_fast {implementation}" + ("" if biased else " without bias")
    return Baseline(name, what[implementation], build, kernel, missing_reason, biased=biased, learnable=biased)


def _sdpa(inputs: Inputs, bias: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))  # [B, H, N, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).contiguous()


def _prebuilt_bias(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """Build the dense bias `[1, H, N, N]` once, with padded rows.

    Rows are padded to a multiple of 8 elements. Memory-efficient SDPA would otherwise pad them in each call.
    """
    with torch.no_grad():
        bias = gather_bias(inputs.table, case.window)[None]
        bias = F.pad(bias, (0, -case.tokens % 8))[..., : case.tokens]
    return lambda: bias


def _gathered_bias(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """Gather the dense bias `[1, H, N, N]` in each call.

    Training has to gather it in each step. Only the index is cached.
    """
    index = relative_position_index(case.window, case.device)
    return lambda: gather_bias(inputs.table, case.window, index)[None]


def _no_bias(case: Case, inputs: Inputs) -> Callable[[], None]:
    return lambda: None


_BIASES: dict[str, tuple[Callable[[Case, Inputs], Callable[[], Tensor | None]], str]] = {
    "prebuilt bias": (_prebuilt_bias, "SDPA with a dense bias that is built before the clock starts"),
    "gathered bias": (_gathered_bias, "SDPA with a dense bias gathered from the table in each call"),
    "without bias": (_no_bias, "SDPA without a bias: the limit for a bias that costs nothing; computes another result"),
}


def _sdpa_baseline(kind: str, backend: SDPBackend | None = None) -> Baseline:
    """Declare SDPA for a kind of bias. PyTorch chooses the backend if it is None."""
    bias_of, what = _BIASES[kind]
    biased = kind != "without bias"
    label = backend.name.removesuffix("_ATTENTION").lower() if backend else "chosen"

    def build(case: Case, inputs: Inputs) -> Attention:
        bias = bias_of(case, inputs)
        if backend is None:
            return lambda: _sdpa(inputs, bias(), case.scale)

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return _sdpa(inputs, bias(), case.scale)

        return run

    def missing_reason(case: Case) -> str | None:
        if backend is None and case.device == "cuda":
            return "on CUDA each backend is measured under its own name"
        if backend is not None and case.device != "cuda":
            return f"needs a CUDA backend of SDPA, but the case runs on {case.device}"
        if kind == "prebuilt bias" and case.trains_table:
            return "a prebuilt bias has no gradient for the table"
        return None if backend is None else _backend_error(case, build, biased)

    learnable = kind == "gathered bias" and backend != SDPBackend.CUDNN_ATTENTION
    name = f"sdpa {kind} {label}" if backend else f"sdpa {kind}"
    return Baseline(name, what, build, lambda case: f"sdpa/{label}", missing_reason, biased=biased, learnable=learnable)


def _backend_error(case: Case, build: Callable[[Case, Inputs], Attention], biased: bool) -> str | None:
    """Return PyTorch's error if the backend does not support the case. The backward is included."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            inputs = draw(case)
            results_of(case, inputs, build(case, inputs), biased)
        except RuntimeError as error:
            reasons = [str(error), *(str(warning.message) for warning in caught)]
            return "; ".join(dict.fromkeys(reason.splitlines()[0] for reason in reasons))
    return None


RowOf = Callable[[Tensor, Tensor], Tensor]
"""Maps a query and a key of a score_mod of FlexAttention, 0-d tensors, to a row of the table."""


def row_by_index(case: Case) -> RowOf:
    """Read rows from a dense index `[N, N]`."""
    index = relative_position_index(case.window, case.device).int()
    return lambda query, key: index[query, key]


def row_by_coordinates(case: Case) -> RowOf:
    """Compute rows from the coordinates of the tokens."""
    height, width = case.window
    rows = table_rows(case.window)

    def row_of(query: Tensor, key: Tensor) -> Tensor:
        from_patch, to_patch = query - 1, key - 1
        down = from_patch // width - to_patch // width + height - 1
        right = from_patch % width - to_patch % width + width - 1
        patches = down * (2 * width - 1) + right
        of_cls_key = torch.where(query == 0, rows - 1, rows - 2)
        return torch.where(key == 0, of_cls_key, torch.where(query == 0, rows - 3, patches))

    return row_of


def _flex_attention(name: str, row_by: Callable[[Case], RowOf], how: str) -> Baseline:
    def build(case: Case, inputs: Inputs) -> Attention:
        from torch.nn.attention.flex_attention import flex_attention

        if case.mode == BACKWARD:
            _allow_repeated_compiled_backward()
        table = inputs.table if case.trains_table else inputs.table.detach()
        row_of = row_by(case)

        def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + table[row_of(query, key), head]

        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))  # [B, H, N, D]
            return compiled(q, k, v, score_mod=add_bias, scale=case.scale).transpose(1, 2).contiguous()

        return run

    def missing_reason(case: Case) -> str | None:
        return "FlexAttention does not support training on a CPU" if case.trains and case.device == "cpu" else None

    what = f"compiled FlexAttention whose score_mod reads the table at a row {how}"
    return Baseline(name, what, build, lambda case: "flex_attention", missing_reason, compiles=True)


def _allow_repeated_compiled_backward() -> None:
    """Allow a compiled backward to run several times on one graph. It does not reuse the memory of its inputs."""
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    functorch_config.enable_autograd_cache = False


class _Constant(nn.Module):
    """Fixed tensor in place of a projection. Only attention is timed."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value.flatten(2)  # [B, N, H * D]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.value


def _transformers(implementation: str) -> Baseline:
    def build(case: Case, inputs: Inputs) -> Attention:
        from transformers.models.beit import modeling_beit

        older = hasattr(modeling_beit, "BEIT_SELF_ATTENTION_CLASSES")  # 4.x
        return (_transformers_4 if older else _transformers_5)(case, inputs, implementation)

    def missing_reason(case: Case) -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed (pip install 'beit-fast[bench]')"
        height, width = case.window
        return None if height == width else "transformers reads the table wrongly if the window is not square"

    what = f"attention of BEiT in Transformers, {implementation}"
    return Baseline(f"transformers {implementation}", what, build, lambda case: implementation, missing_reason)


def _transformers_config(case: Case, implementation: str) -> object:
    from transformers import BeitConfig

    return BeitConfig(
        hidden_size=case.heads * case.head_dim,
        num_attention_heads=case.heads,
        image_size=16 * case.window[0],
        patch_size=16,
        use_relative_position_bias=True,
        attn_implementation=implementation,
    )


def _transformers_5(case: Case, inputs: Inputs, implementation: str) -> Attention:
    """Build the attention of Transformers 5. It gets the bias as a mask."""
    from transformers.models.beit.modeling_beit import BeitAttention, BeitRelativePositionBias

    config = _transformers_config(case, implementation)
    position_bias = BeitRelativePositionBias(config)
    position_bias.relative_position_bias_table = inputs.table
    module = BeitAttention(config).to(case.device)
    module.q_proj, module.k_proj, module.v_proj = (_Constant(x) for x in (inputs.q, inputs.k, inputs.v))
    module.o_proj = nn.Identity()

    def run() -> Tensor:
        bias = position_bias(case.window, dim_size=case.tokens)
        out, _ = module(module.q_proj.value, attention_mask=bias)
        return out.unflatten(2, (case.heads, case.head_dim))

    return run


def _transformers_4(case: Case, inputs: Inputs, implementation: str) -> Attention:
    """Build the attention of Transformers 4. It owns the table and gathers the bias."""
    from transformers.models.beit.modeling_beit import BEIT_SELF_ATTENTION_CLASSES

    attention_class = BEIT_SELF_ATTENTION_CLASSES[implementation]
    module = attention_class(_transformers_config(case, implementation), window_size=case.window).to(case.device)
    module.relative_position_bias.relative_position_bias_table = inputs.table
    module.query, module.key, module.value = (_Constant(x) for x in (inputs.q, inputs.k, inputs.v))
    resolution = tuple(16 * side for side in case.window)

    def run() -> Tensor:
        out = module(module.query.value, resolution=resolution)[0]
        return out.unflatten(2, (case.heads, case.head_dim))

    return run


_CUDNN, _EFFICIENT = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
_FLASH, _MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH

BASELINES = (
    _ours("triton"),
    _ours("triton", biased=False),
    _ours("sdpa"),
    _ours("eager"),
    _transformers("sdpa"),
    _transformers("eager"),
    _flex_attention("flex_attention", row_by_index, "from a dense index"),
    _flex_attention("flex_attention coordinates", row_by_coordinates, "computed from the tokens' coordinates"),
    _sdpa_baseline("prebuilt bias"),
    *(_sdpa_baseline("prebuilt bias", backend) for backend in (_CUDNN, _EFFICIENT, _MATH)),
    *(_sdpa_baseline("gathered bias", backend) for backend in (_CUDNN, _EFFICIENT, _MATH)),
    _sdpa_baseline("without bias"),
    *(_sdpa_baseline("without bias", backend) for backend in (_FLASH, _CUDNN, _EFFICIENT)),
)
