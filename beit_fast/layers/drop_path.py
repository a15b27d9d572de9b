"""Stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BeitDropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): a residual branch is dropped, or scaled by 1 / keep."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: Tensor) -> Tensor:
        factors = self._draw(branch)
        return branch if factors is None else branch * factors.view(-1, *[1] * (branch.ndim - 1))

    def factors(self, branch: Tensor) -> Tensor | None:
        """fp32 `[B]`: what `forward` would multiply each sample of this branch by; None where nothing is dropped."""
        return self._draw(branch, torch.float32)

    def _draw(self, branch: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1.0 - self.drop_prob
        keep = branch.new_empty(branch.shape[0]).bernoulli_(keep_prob).to(dtype or branch.dtype)
        return keep / keep_prob if keep_prob > 0 else keep

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"
