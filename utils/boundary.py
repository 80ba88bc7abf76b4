"""Boundaries of masks and how well two of them agree, for NumPy masks one by one and for batches on a device.

The score is the boundary F1 of Bokhovkin & Burnaev (2019) on hard masks: a mask's boundary is what a `theta0` box
erosion takes away, and a boundary pixel is matched within a `theta` box, (theta - 1) / 2 pixels in Chebyshev distance.
The image frame is not a boundary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.scores import BoundaryCounts


def boundary_counts(
    pred: Tensor, mask: Tensor, theta0: int = 3, theta: int = 5, void: Tensor | None = None
) -> BoundaryCounts:
    """Boundary counts of two batches of masks, (N, H, W) bool, as (N,) integer tensors on their device.

    `void` (N, H, W) bool marks pixels to ignore: they are no boundary and make none beside them.
    """
    edge_pred, edge_mask = (edges(m, theta0, void) for m in (pred, mask))
    hits = edge_pred & _box(edge_mask, theta, torch.bitwise_or), edge_mask & _box(edge_pred, theta, torch.bitwise_or)
    return BoundaryCounts(*(m.sum((1, 2)) for m in (edge_pred, edge_mask, *hits)))


def edges(mask: Tensor, theta0: int = 3, void: Tensor | None = None) -> Tensor:
    """(N, H, W) bool -> its boundary, bool: the pixels that a theta0 x theta0 erosion removes."""
    if void is None:
        return mask & ~_box(mask, theta0, torch.bitwise_and)
    return mask & ~void & ~_box(mask | void, theta0, torch.bitwise_and)


def soft_boundary_f(score: Tensor, mask: Tensor, theta0: int = 3, theta: int = 5) -> Tensor:
    """Differentiable boundary F1 of (N, 1, H, W) scores against masks in {0, 1}, as (N,).

    Of probabilities it is the loss of Bokhovkin & Burnaev (1 - value). Of raw logits it is what the released NLKD code
    takes for the student's quality: no score in [0, 1]; only `--compat nlkd` uses it.
    """

    def grow(m, width):
        return F.max_pool2d(m, width, stride=1, padding=width // 2)

    edge_mask, edge_pred = (grow(1 - m, theta0) - (1 - m) for m in (mask, score))
    precision = (edge_pred * grow(edge_mask, theta)).sum((1, 2, 3)) / (edge_pred.sum((1, 2, 3)) + 1e-7)
    recall = (edge_mask * grow(edge_pred, theta)).sum((1, 2, 3)) / (edge_mask.sum((1, 2, 3)) + 1e-7)
    return 2 * precision * recall / (precision + recall + 1e-7)


def _box(mask: Tensor, width: int, join) -> Tensor:
    # Separable, in place, on one byte a pixel: exact, and several times cheaper than max pooling floats.
    for axis in (1, 2):
        source, mask = mask, mask.clone()
        for shift in range(1, min(width // 2, mask.shape[axis] - 1) + 1):
            n = mask.shape[axis] - shift
            low, high = mask.narrow(axis, 0, n), mask.narrow(axis, shift, n)
            join(low, source.narrow(axis, shift, n), out=low)
            join(high, source.narrow(axis, 0, n), out=high)
    return mask
