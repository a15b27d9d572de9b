"""The operators `torch.ops.beit_fast.*` and their registrations with PyTorch."""

from .. import native
from . import compile_cache as compile_cache
from . import dtensor_rules as dtensor_rules
from . import flops as flops
from . import linear_gelu as linear_gelu
from . import residual_norm as residual_norm
from .attention import attention_backward_op, attention_op
from .cpu_linear import split_bf16 as split_bf16
from .library import library
from .patch_embed import patch_embed_op

native.load("_C")

__all__ = ["attention_backward_op", "attention_op", "library", "patch_embed_op"]
