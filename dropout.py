"""Dropout that is fast on a CPU, too."""

import torch
from torch import nn


class Dropout(nn.Dropout):
    """nn.Dropout. On a CPU, where that draws number after number on one core, by 16 random bits a number instead, and
    with a mask of one byte a number for the backward pass."""

    def forward(self, x):
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        keep = bits[:x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return (x * keep).div_(1 - self.p)
