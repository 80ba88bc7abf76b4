"""Scores of masks from counts of pixels; the same formulas for one pair, a batch on a device, or a whole split."""

import torch
from torch import Tensor

from utils.boundary import boundary_counts
from utils.images import IGNORE
from utils.scores import binary_scores, ratio


def sample_scores(pred: Tensor, mask: Tensor, classes: int = 1, theta0: int = 3, theta: int = 5) -> dict[str, Tensor]:
    """Scores of every image of a batch: (N, H, W) uint8 class indices -> {name: (N,) float32} on the same device."""
    if classes == 1:
        return _sample_scores_of(pred.bool(), mask.bool(), None, theta0, theta)
    void = mask == IGNORE
    each = [_sample_scores_of((pred == c) & ~void, mask == c, void, theta0, theta) for c in range(classes)]
    present = torch.stack([((((pred == c) & ~void) | (mask == c)).flatten(1).any(1)) for c in range(classes)])

    def class_mean(name):
        values = torch.stack([scores[name] for scores in each])
        return ratio((values * present).sum(0), present.sum(0))

    scores = {name: class_mean(name) for name in ("iou", "dice", "bf")}
    return scores | {"miou": scores["iou"], "bm": (scores["bf"] + scores["iou"]) / 2}


def confusion(pred: Tensor, mask: Tensor, classes: int) -> Tensor:
    """(C, C) int64 counts, row = annotated class, column = predicted class; C = max(2, classes), 255 left out."""
    c = max(2, classes)
    pairs = mask.long() * c + pred.long()
    pairs = torch.where(mask == IGNORE, c * c, pairs)  # one bin more for what does not count
    return torch.bincount(pairs.flatten(), minlength=c * c + 1)[: c * c].reshape(c, c)


def split_iou(counts: Tensor) -> dict[str, float]:
    """`miou` (one IoU a class from summed counts, mean over the classes present) and `iou` (binary: foreground)."""
    counts = counts.double()
    hit, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = union > 0
    each = hit[present] / union[present]
    miou = float(each.mean()) if len(each) else 1.0
    return {"iou": float(ratio(hit[1], union[1])) if len(counts) == 2 else miou, "miou": miou}


def _sample_scores_of(pred, mask, void, theta0, theta):
    pixels = pred[0].numel() if void is None else (~void).sum((1, 2))
    areas = ((m).sum((1, 2)) for m in (pred & mask, pred, mask))
    return binary_scores(*areas, pixels, boundary_counts(pred, mask, theta0, theta, void))
