"""The two halves of the MLP."""

from __future__ import annotations

from torch import Tensor, nn

from ..configuration.beit_config import BeitConfig
from .activations import ACTIVATIONS
from .context import BlockContext
from .linear import apply_linear


class BeitIntermediate(nn.Module):
    """First half of the MLP: expand, activate."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]()

    def forward(self, hidden_states: Tensor, context: BlockContext) -> Tensor:
        return self.activation(apply_linear(self.dense, hidden_states, context.kernels.gemm))


class BeitOutput(nn.Module):
    """Second half of the MLP: project back, dropout."""

    def __init__(self, config: BeitConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, context: BlockContext) -> Tensor:
        return self.dropout(apply_linear(self.dense, hidden_states, context.kernels.gemm))
