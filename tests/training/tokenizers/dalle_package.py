"""Modules with the class names, structure and arithmetic of the package `dall_e`, to write its files."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kw: int) -> None:
        super().__init__()
        self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, True
        self.device, self.requires_grad = torch.device("cpu"), False
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / (n_in * kw**2) ** 0.5, requires_grad=False)
        self.b = nn.Parameter(torch.randn(n_out), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)


class EncoderBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, n_layers: int) -> None:
        super().__init__()
        self.post_gain = n_layers**-2
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        steps: list[tuple[str, nn.Module]] = []
        widths = [n_in, n_out // 4, n_out // 4, n_out // 4, n_out]
        for number, ((before, after), kw) in enumerate(zip(pairwise(widths), (3, 3, 3, 1), strict=True), 1):
            steps += [(f"relu_{number}", nn.ReLU()), (f"conv_{number}", Conv2d(before, after, kw))]
        self.res_path = nn.Sequential(OrderedDict(steps))

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.post_gain * self.res_path(x)


class Encoder(nn.Module):
    def __init__(self, n_hid: int, vocab_size: int, n_blk_per_group: int) -> None:
        super().__init__()
        self.n_hid, self.vocab_size, self.device = n_hid, vocab_size, torch.device("cpu")
        parts: list[tuple[str, nn.Module]] = [("input", Conv2d(3, n_hid, 7))]
        width = n_hid
        for group in range(1, 5):
            steps: list[tuple[str, nn.Module]] = []
            for block in range(1, n_blk_per_group + 1):
                after = n_hid * 2 ** (group - 1)
                steps.append((f"block_{block}", EncoderBlock(width, after, 4 * n_blk_per_group)))
                width = after
            if group < 4:
                steps.append(("pool", nn.MaxPool2d(kernel_size=2)))
            parts.append((f"group_{group}", nn.Sequential(OrderedDict(steps))))
        output = OrderedDict([("relu", nn.ReLU()), ("conv", Conv2d(width, vocab_size, 1))])
        self.blocks = nn.Sequential(OrderedDict([*parts, ("output", nn.Sequential(output))]))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@contextmanager
def installed() -> Iterator[None]:
    """Let pickles name these classes as those of the package; afterwards it cannot be imported."""
    homes = {"dall_e": [], "dall_e.encoder": [Encoder, EncoderBlock], "dall_e.utils": [Conv2d]}
    places = {kind: kind.__module__ for kinds in homes.values() for kind in kinds}
    for name, kinds in homes.items():
        module = sys.modules[name] = ModuleType(name)
        for kind in kinds:
            kind.__module__ = name
            setattr(module, kind.__name__, kind)
    try:
        yield
    finally:
        for name in homes:
            del sys.modules[name]
        for kind, place in places.items():
            kind.__module__ = place
