"""Images made divisible, for networks that halve them several times."""

import torch.nn.functional as F
from torch import Tensor


def pad_to(x: Tensor, stride: int) -> tuple[Tensor, int, int]:
    """(N, C, H, W) padded to multiples of `stride`, and how many rows and columns stand before it now.

    By reflection on both sides; what is smaller than its padding repeats its edges.
    """
    h, w = x.shape[2:]
    high, wide = -h % stride, -w % stride
    if high or wide:
        sides = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
        how = "reflect" if max(sides[:2]) < w and max(sides[2:]) < h else "replicate"
        x = F.pad(x, sides, mode=how)
    return x, high // 2, wide // 2
