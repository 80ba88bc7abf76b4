"""Scores of masks from counts of pixels; the same formulas for one pair, a batch on a device, or a whole split."""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.boundary import match_binary, match_classes
from utils.scores import BoundaryCounts, binary_scores, ratio


class PixelCounts(NamedTuple):
    """Pixels of every class and image, (classes, N) int64: in both masks, in either, and on their boundaries."""

    inter: Tensor
    pred: Tensor
    mask: Tensor
    boundary: BoundaryCounts
    pixels: int  # of an image


def sample_scores(pred: Tensor, mask: Tensor, classes: int = 1, theta0: int = 3, theta: int = 5) -> dict[str, Tensor]:
    """Scores of every image of a batch: (N, H, W) uint8 class indices -> {name: (N,) float32} on the same device."""
    return scores_of(pixel_counts(pred, mask, classes, theta0, theta))


def pixel_counts(pred: Tensor, mask: Tensor, classes: int = 1, theta0: int = 3, theta: int = 5) -> PixelCounts:
    """What every score of a batch is made of: (N, H, W) uint8 class indices; binary masks have one class, 1.

    Nothing waits for the device.
    """
    pixels = pred.shape[1] * pred.shape[2]
    # a processor is fastest with as many images at a time as its cache holds, another device with all
    some = max(1, 2**17 // pixels) if pred.device.type == "cpu" else len(pred)
    pairs = zip(pred.split(some), mask.split(some), strict=True)
    if classes == 1:
        parts = [_count_binary(*pair, theta0, theta) for pair in pairs]
    else:
        parts = [_count_classes(*pair, classes, theta0, theta) for pair in pairs]
    counts = torch.cat(parts, 2)
    return PixelCounts(*counts[:3], BoundaryCounts(*counts[3:]), pixels)


def scores_of(counts: PixelCounts) -> dict[str, Tensor]:
    """`sample_scores` from the counts: means over the classes present in either mask, {name: (N,) float32}."""
    inter, pred, mask, boundary, pixels = counts
    scores = binary_scores(inter, pred, mask, pixels, boundary)
    if len(inter) == 1:
        return {name: value[0] for name, value in scores.items()}
    present = pred + mask > 0
    number = present.sum(0)
    means = {name: ratio((scores[name] * present).sum(0), number) for name in ("iou", "dice", "bf")}
    return means | {"miou": means["iou"], "bm": (means["bf"] + means["iou"]) / 2}


def split_iou(inter: Tensor, pred: Tensor, mask: Tensor) -> dict[str, float]:
    """`miou` and `iou` of a split from its (classes,) pixel counts: one IoU a class, mean over the classes present.

    With two entries the second is the foreground, whose IoU is `iou`; else both are the same.
    """
    inter, union = inter.double(), (pred + mask - inter).double()
    present = union > 0
    each = inter[present] / union[present]
    miou = float(each.mean()) if len(each) else 1.0
    return {"iou": float(ratio(inter[1], union[1])) if len(inter) == 2 else miou, "miou": miou}


def _count_binary(pred, mask, theta0, theta):
    bits = match_binary(pred.bool(), mask.bool(), theta0, theta)
    # eight pixels an int64, a byte each, of which no more than 255 are added
    words = bits.view(torch.int64)
    words = words.view(len(pred), words.shape[1] * -(-words.shape[2] // 255), -1)
    shift = torch.arange(7, device=words.device).view(7, 1, 1, 1)
    sums = ((words >> shift) & 0x0101010101010101).sum(3)
    return sums.view(torch.uint8).sum(2)[:, None].roll(1, 0)  # the last bit is what both have


def _count_classes(pred, mask, classes, theta0, theta):
    label, known, edge = match_classes(pred, mask, classes, theta0, theta)
    edge[1].add_(torch.eq(label[0], label[1]).view(torch.uint8), alpha=4)
    # a counter for each map, image, class and kind; what does not count goes with the classes beyond the last
    row = (label | (known - 1)).clamp_(max=classes).short().mul_(8).add_(edge.short()).flatten(2).long()
    found = torch.zeros((*row.shape[:2], 8 * (classes + 1)), dtype=torch.int64, device=row.device)
    found.scatter_add_(2, row, torch.ones((), dtype=torch.int64, device=row.device).expand_as(row))
    kinds = found.view(2, len(pred), classes + 1, 2, 4)[:, :, :classes].permute(3, 4, 0, 2, 1)  # class by image last
    inter, (_, missed, hit, _) = kinds[1, :, 1].sum(0, keepdim=True), kinds.sum(0)
    return torch.cat([inter, kinds.sum((0, 1)), missed + hit, hit])
