"""Which classes an image holds, and logits that keep to them."""

import torch
from torch import Tensor


def classes_in(mask: Tensor, classes: int) -> Tensor:
    """(N, H, W) uint8 masks -> (N, C) bool, the classes they hold; C is `classes`, of binary masks 2. 255 is none."""
    found = torch.zeros(len(mask), 256, dtype=torch.bool, device=mask.device)
    return found.scatter_(1, mask.flatten(1).long(), True)[:, : max(2, classes)]


def restrict(logits: Tensor, present: Tensor) -> Tensor:
    """Logits (N, C, ...) in float32, at -inf for classes that an image does not hold by `present` (N, C) bool.

    One channel stands for the classes 0 and 1: `present` is (N, 2), and an image that holds one of them only has -inf
    or inf everywhere. An image of which no class is known keeps its logits.
    """
    logits, unknown = logits.float(), ~present.any(1, keepdim=True)
    lacks = ~(present | unknown).view(*present.shape, *[1] * (logits.ndim - 2))
    if logits.shape[1] == 1:
        return logits.masked_fill(lacks[:, 1:], -torch.inf).masked_fill(lacks[:, :1], torch.inf)
    return logits.masked_fill(lacks, -torch.inf)
