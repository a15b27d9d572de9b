"""Stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BeitDropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): a residual branch is dropped, or scaled by 1 / keep_prob."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: Tensor) -> Tensor:
        scale = self._draw(branch)  # [B]
        return branch if scale is None else branch * scale.view(-1, *[1] * (branch.ndim - 1))

    def drop_path_scale(self, branch: Tensor) -> Tensor | None:
        """Draw the factor of each sample of `branch`, fp32 `[B]`; None if nothing is dropped."""
        return self._draw(branch, torch.float32)

    def _draw(self, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1.0 - self.drop_prob
        kept = branch.new_empty(branch.shape[0]).bernoulli_(keep_prob).to(dtype or branch.dtype)
        return kept / keep_prob if keep_prob > 0 else kept

    def extra_repr(self) -> str:
        return f"p={self.drop_prob:.3g}"
