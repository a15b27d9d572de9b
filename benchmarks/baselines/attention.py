"""Who is measured: every peer declared once, with the reason where it cannot take part."""

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

from beit_fast.layers.attention_backends import attend
from beit_fast.ops.dispatch import attention
from beit_fast.position_bias import gather_bias, relative_position_index, table_rows

from ..harness.cases import BACKWARD, Case, Inputs, draw, results_of

Attention = Callable[[], Tensor]
"""One forward over inputs bound when it was built; gives `[B, N, H, D]`, contiguous, as a model needs it."""


PACKAGES = {
    "cpu": ("transformers", "timm", "onnx", "onnxruntime", "openvino"),
    "cuda": ("transformers", "timm"),
}
"""What has to be installed, by device, so that no peer of any bench is missing."""


def not_installed(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _never_missing(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """One way to compute attention.

    name: unique. what: one line for the reader. build: binds a case and its inputs to a function.
    kernel: what runs. why_missing: the reason why it cannot take part in a case, or None.
    biased: whether it adds the relative position bias. learnable: whether the table can be trained through it.
    compiles: whether building compiles for long on a CPU.
    """

    name: str
    what: str
    build: Callable[[Case, Inputs], Attention]
    kernel: Callable[[Case], str]
    why_missing: Callable[[Case], str | None] = _never_missing
    biased: bool = True
    learnable: bool = True
    compiles: bool = False

    def __str__(self) -> str:
        return self.name


def _ours(implementation: str, biased: bool = True) -> Peer:
    what = {
        "triton": "the bias read inside the kernel" if biased else "the same kernel without its bias",
        "eager": "gathered bias, matrix products and softmax",
        "sdpa": "gathered bias given to SDPA",
    }

    def build(case: Case, inputs: Inputs) -> Attention:
        return functools.partial(
            attend,
            inputs.q,
            inputs.k,
            inputs.v,
            table=inputs.table if biased else None,
            window=case.window,
            scale=case.scale,
            implementation=implementation,
        )

    def kernel(case: Case) -> str:
        return attention.kernel_name(implementation, torch.device(case.device), case.dtype, case.head_dim)

    def why_missing(case: Case) -> str | None:
        return "tells what the bias costs in the CUDA kernel" if not biased and case.device == "cpu" else None

    name = f"beit_fast {implementation}" + ("" if biased else " without bias")
    return Peer(name, what[implementation], build, kernel, why_missing, biased=biased, learnable=biased)


def _sdpa(inputs: Inputs, bias: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))  # [B, H, N, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.transpose(1, 2).contiguous()


def _prebuilt_bias(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """The dense bias `[1, H, N, N]`, built once; memory-efficient SDPA would pad rows to 8 elements in each call."""
    with torch.no_grad():
        bias = gather_bias(inputs.table, case.window)[None]
        bias = F.pad(bias, (0, -case.tokens % 8))[..., : case.tokens]
    return lambda: bias


def _gathered_bias(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """The dense bias `[1, H, N, N]` gathered anew at each call, as training has to; only the index is kept."""
    index = relative_position_index(case.window, case.device)
    return lambda: gather_bias(inputs.table, case.window, index)[None]


def _no_bias(case: Case, inputs: Inputs) -> Callable[[], None]:
    return lambda: None


_BIASES: dict[str, tuple[Callable[[Case, Inputs], Callable[[], Tensor | None]], str]] = {
    "prebuilt bias": (_prebuilt_bias, "SDPA with a dense bias that is built beforehand and not timed"),
    "gathered bias": (_gathered_bias, "SDPA with a dense bias gathered from the table in each call"),
    "without bias": (_no_bias, "the speed limit for a bias that costs nothing; computes something else"),
}


def _sdpa_peer(kind: str, backend: SDPBackend | None = None) -> Peer:
    """SDPA under one of `_BIASES` with the named backend, or with the one that PyTorch chooses."""
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

    def why_missing(case: Case) -> str | None:
        if backend is None and case.device == "cuda":
            return "PyTorch chooses; on CUDA each of its backends takes part by name"
        if backend is not None and case.device != "cuda":
            return f"forces a CUDA backend of SDPA, this case runs on {case.device}"
        if kind == "prebuilt bias" and case.trains_table:
            return "a bias that is built beforehand gives the table no gradient"
        return None if backend is None else _refusal(case, build, biased)

    learnable = kind == "gathered bias" and backend != SDPBackend.CUDNN_ATTENTION
    name = f"sdpa {kind} {label}" if backend else f"sdpa {kind}"
    return Peer(name, what, build, lambda case: f"sdpa/{label}", why_missing, biased=biased, learnable=learnable)


def _refusal(case: Case, build: Callable[[Case, Inputs], Attention], biased: bool) -> str | None:
    """What PyTorch says where the forced backend does not take the case, or not its backward."""
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
"""The table's row for a query and a key, as FlexAttention's score_mod sees them: 0-d tensors."""


def row_by_index(case: Case) -> RowOf:
    index = relative_position_index(case.window, case.device).int()
    return lambda query, key: index[query, key]


def row_by_coordinates(case: Case) -> RowOf:
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


def _flex_attention(name: str, row_by: Callable[[Case], RowOf], how: str) -> Peer:
    def build(case: Case, inputs: Inputs) -> Attention:
        from torch.nn.attention.flex_attention import flex_attention

        if case.mode == BACKWARD:
            _let_compiled_backward_run_again()
        table = inputs.table if case.trains_table else inputs.table.detach()
        row_of = row_by(case)

        def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + table[row_of(query, key), head]

        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))  # [B, H, N, D]
            return compiled(q, k, v, score_mod=add_bias, scale=case.scale).transpose(1, 2).contiguous()

        return run

    def why_missing(case: Case) -> str | None:
        return "FlexAttention on a CPU is for inference only" if case.trains and case.device == "cpu" else None

    what = f"FlexAttention, compiled, with a score_mod that reads the table at a row {how}"
    return Peer(name, what, build, lambda case: "flex_attention", why_missing, compiles=True)


def _let_compiled_backward_run_again() -> None:
    """A compiled backward reuses its inputs' memory unless it is compiled for a graph that is kept, and not cached."""
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    functorch_config.enable_autograd_cache = False


class _Given(nn.Module):
    """Stands in for a projection and gives a tensor that exists, so that only attention is timed."""

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.given = given.flatten(2)  # [B, N, H * D]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.given


def _transformers(implementation: str) -> Peer:
    def build(case: Case, inputs: Inputs) -> Attention:
        from transformers.models.beit import modeling_beit

        older = hasattr(modeling_beit, "BEIT_SELF_ATTENTION_CLASSES")  # 4.x
        return (_transformers_4 if older else _transformers_5)(case, inputs, implementation)

    def why_missing(case: Case) -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed (pip install 'beit-fast[bench]')"
        height, width = case.window
        return None if height == width else "transformers reads the table of a rectangular window the wrong way"

    what = f"BEiT's attention as Transformers runs it in each layer, {implementation}"
    return Peer(f"transformers {implementation}", what, build, lambda case: implementation, why_missing)


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
    """Transformers 5: the layer builds the bias and gives it to the attention as a mask."""
    from transformers.models.beit.modeling_beit import BeitAttention, BeitRelativePositionBias

    config = _transformers_config(case, implementation)
    position_bias = BeitRelativePositionBias(config)
    position_bias.relative_position_bias_table = inputs.table
    module = BeitAttention(config).to(case.device)
    module.q_proj, module.k_proj, module.v_proj = (_Given(x) for x in (inputs.q, inputs.k, inputs.v))
    module.o_proj = nn.Identity()

    def run() -> Tensor:
        bias = position_bias(case.window, dim_size=case.tokens)
        out, _ = module(module.q_proj.given, attention_mask=bias)
        return out.unflatten(2, (case.heads, case.head_dim))

    return run


def _transformers_4(case: Case, inputs: Inputs, implementation: str) -> Attention:
    """Transformers 4: the attention owns the table and builds the bias itself."""
    from transformers.models.beit.modeling_beit import BEIT_SELF_ATTENTION_CLASSES

    attention_class = BEIT_SELF_ATTENTION_CLASSES[implementation]
    module = attention_class(_transformers_config(case, implementation), window_size=case.window).to(case.device)
    module.relative_position_bias.relative_position_bias_table = inputs.table
    module.query, module.key, module.value = (_Given(x) for x in (inputs.q, inputs.k, inputs.v))
    resolution = tuple(16 * side for side in case.window)

    def run() -> Tensor:
        out = module(module.query.given, resolution=resolution)[0]
        return out.unflatten(2, (case.heads, case.head_dim))

    return run


_CUDNN, _EFFICIENT = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
_FLASH, _MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.MATH

PEERS = (
    _ours("triton"),
    _ours("triton", biased=False),
    _ours("sdpa"),
    _ours("eager"),
    _transformers("sdpa"),
    _transformers("eager"),
    _flex_attention("flex_attention", row_by_index, "from a dense index"),
    _flex_attention("flex_attention coordinates", row_by_coordinates, "computed from the tokens' coordinates"),
    _sdpa_peer("prebuilt bias"),
    *(_sdpa_peer("prebuilt bias", backend) for backend in (_CUDNN, _EFFICIENT, _MATH)),
    *(_sdpa_peer("gathered bias", backend) for backend in (_CUDNN, _EFFICIENT, _MATH)),
    _sdpa_peer("without bias"),
    *(_sdpa_peer("without bias", backend) for backend in (_FLASH, _CUDNN, _EFFICIENT)),
)
