"""Segmentation losses before any weighting or selection."""

import torch
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


def ohem_loss(logits: Tensor, mask: Tensor, threshold: float = 0.7, min_kept: int = 100_000) -> Tensor:
    """Mean cross entropy of the hard pixels of a batch, a scalar: online hard example mining.

    logits (N, 1, H, W) or (N, C, H, W), mask (N, H, W) uint8. Hard are pixels to whose class the network gives at most
    `threshold` probability, and at least the `min_kept` hardest; fewer annotated pixels than that are all used, and so
    are all with `min_kept` 0, as in the released code of U2PL. 0 where nothing is annotated.
    """
    loss = per_pixel_loss(logits, mask).flatten()
    valid = (mask != IGNORE).flatten() if logits.shape[1] > 1 else torch.ones_like(loss, dtype=torch.bool)
    kept = valid
    if 0 < min_kept <= loss.numel():
        prob = torch.exp(-loss.detach()).masked_fill(~valid, 1.0)
        limit = prob.kthvalue(min_kept).values.clamp(min=threshold)
        kept = valid & ((prob <= limit) | (valid.sum() < min_kept))
    return (loss * kept).sum() / kept.sum().clamp(min=1)
