"""Segmentation losses before any weighting or selection."""

import torch.nn.functional as F
from torch import Tensor

from utils.images import IGNORE
from utils.points import PointLogits, dense, spread_points


def per_pixel_loss(logits: Tensor | PointLogits, mask: Tensor) -> Tensor:
    """Cross entropy of every pixel: logits (N, 1, H, W) binary or (N, C, H, W), mask (N, H, W) uint8 -> (N, H, W).

    Computed in float32; pixels marked 255 in a many-class mask get 0. Of `PointLogits`, see `spread_points`.
    """
    if isinstance(logits, PointLogits):
        return spread_points(per_pixel_loss, logits, mask)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0].float(), mask.float(), reduction="none")
    return F.cross_entropy(logits.float(), mask.long(), ignore_index=IGNORE, reduction="none")


def per_image_loss(logits: Tensor | PointLogits, mask: Tensor) -> Tensor:
    """Mean cross entropy over the annotated pixels of every image, (N,); 0 for an image without any."""
    loss = per_pixel_loss(logits, mask)
    if logits.shape[1] == 1:
        return loss.mean((1, 2))
    return loss.sum((1, 2)) / (mask != IGNORE).sum((1, 2)).clamp(min=1)


def hard(logits: Tensor | PointLogits) -> Tensor:
    """The predicted mask, (N, H, W) uint8: logit > 0 for one channel, else the largest channel; no gradient."""
    logits = dense(logits).detach()
    return logits[:, 0].gt(0).byte() if logits.shape[1] == 1 else logits.argmax(1).byte()
