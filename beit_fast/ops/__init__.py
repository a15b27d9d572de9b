"""The operators `torch.ops.beit_fast.*` and everything that PyTorch needs to know about them."""

from . import compile_cache as compile_cache
from . import dtensor_rules as dtensor_rules
from . import flops as flops
from . import transforms as transforms
from .attention import attention_backward_op, attention_op, library, patch_embed_op

__all__ = ["attention_backward_op", "attention_op", "library", "patch_embed_op"]
