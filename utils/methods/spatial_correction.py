"""Spatial correction: the signed distance between predicted and true contours, and masks moved back by it.

Annotations whose contours lie too far out (or in) on average teach a network the same. A few clean masks tell by how
many pixels, and the network's own predictions for the training images, moved back by as many, replace their masks.

Source: Yao et al., "Learning to segment from noisy annotations: a spatial correction approach", ICLR 2023.
"""

import cv2
import numpy as np
import torch
from torch import nn

from utils.contour import signed_distance
from utils.errors import InputError
from utils.images import IGNORE

BESIDE = 0.75  # pixels: the first pixel on either side of a contour has its centre half a pixel away


def contour_bias(pred: np.ndarray, mask: np.ndarray, classes: int = 1) -> np.ndarray:
    """How many pixels too large the regions of `pred` are, (classes,) float64; negative: too small.

    `pred` and `mask` are (H, W) uint8 class indices; with one class the region is label 1. The mean, along the contour
    of the true region, of the signed distances to both contours. NaN for a class that either mask lacks or that fills
    it. The frame of the image is no contour, nor is the border of pixels marked 255.
    """
    known = np.ones(mask.shape, np.uint8)
    if classes > 1:
        known = cv2.erode((mask != IGNORE).astype(np.uint8), np.ones((3, 3), np.uint8))
    found = np.full(classes, np.nan)
    for k, label in enumerate(_labels(classes)):
        regions = [(m == label).astype(np.uint8) for m in (pred, mask)]
        if any(region.min() == region.max() for region in regions):
            continue
        of_pred, of_mask = map(signed_distance, regions)
        beside = (np.abs(of_mask) < BESIDE) & (known > 0)
        if beside.any():
            found[k] = (of_mask - of_pred)[beside].mean()
    return found


def move_contours(pred: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """`pred` (H, W) uint8 with every region smaller by `bias` (classes,) pixels, or larger where that is negative.

    With several classes a pixel goes to the region in which, once all have moved, it lies deepest. A region that would
    vanish or fill the image stays as it is.
    """
    if len(bias) == 1:
        moved = (_distance(pred == 1) < -bias[0]).astype(np.uint8)
        return moved if moved.min() < moved.max() else pred.copy()
    away = np.stack([_distance(pred == label) + bias[label] for label in _labels(len(bias))])
    moved = away.argmin(0).astype(np.uint8)
    for label in np.setdiff1d(pred, moved):
        moved[pred == label] = label
    return moved


def correct_scores(logits: np.ndarray, bias: float) -> np.ndarray:
    """The mask (H, W) uint8 of logits (H, W) that were lowered beside their contour, or raised for a negative bias.

    f - sign(bias) b exp(-d^2 / (2 bias^2)), with d the signed distance to the contour of f > 0 and b the largest |f|
    in the band of |bias| pixels that is to change sides. Published; it moves the contour of logits that grow evenly
    with the distance by 0.75 bias, of saturated ones by less. A region that would vanish or fill the image stays.
    """
    pred = (logits > 0).astype(np.uint8)
    if bias == 0 or pred.min() == pred.max():
        return pred
    away, reach = signed_distance(pred), max(abs(bias), BESIDE)
    band = (away < 0) & (away >= -reach) if bias > 0 else (away > 0) & (away <= reach)
    height = np.abs(logits[band]).max()
    moved = logits - np.sign(bias) * height * np.exp(-(away**2) / (2 * bias**2)) > 0
    return moved.astype(np.uint8) if moved.any() and not moved.all() else pred


def corrected_mask(logits: np.ndarray, given: np.ndarray, bias: np.ndarray, how: str) -> np.ndarray:
    """The mask (H, W) uint8 that replaces `given`: the prediction of logits (C, H, W), moved back by `bias` (C,).

    `how`: "distance" for `move_contours`, "score" (C = 1) for `correct_scores`. Pixels given as 255 stay with C > 1.
    """
    if how == "score":
        return correct_scores(logits[0], float(bias[0]))
    if len(logits) == 1:
        return move_contours((logits[0] > 0).astype(np.uint8), bias)
    moved = move_contours(logits.argmax(0).astype(np.uint8), bias)
    return np.where(given == IGNORE, given, moved)


class Rounds(nn.Module):
    """How far a run has come: the `bias` (classes,) measured last, corrections `made`, whether these are `over`.

    `version` (images,) is the epoch before which the masks in use were made, 0: those given; it is in shared memory,
    so that loader processes see it.
    """

    def __init__(self, classes: int, images: int):
        super().__init__()
        self.register_buffer("bias", torch.zeros(classes, dtype=torch.float64))
        self.register_buffer("made", torch.zeros((), dtype=torch.int64))
        self.register_buffer("over", torch.zeros((), dtype=torch.bool))
        self.register_buffer("version", torch.zeros(images, dtype=torch.int32).share_memory_())

    def corrected(self, epoch: int) -> None:
        """Note a correction of all masks before `epoch`, above 0."""
        self.made += 1
        self.version.fill_(epoch)

    def measured(self, bias: torch.Tensor, least: float) -> dict[str, float]:
        """Take up a bias (classes,) and return it for the log.

        Of a class without one (NaN), or with less than `least` pixels, it counts as 0; if all do, the rounds are over.
        Where no class has one nothing is known: see `known`.
        """
        nothing = bias.isnan().all()
        kept = bias if nothing else torch.where(bias.abs() >= least, bias, 0.0)  # a NaN is not
        self.bias.copy_(kept)
        self.over.fill_(not kept.any())  # a NaN is not 0
        names = ["bias"] if len(bias) == 1 else [f"bias_{k}" for k in range(len(bias))]
        return {name: value for name, value in zip(names, bias.tolist(), strict=True) if value == value}

    def known(self) -> np.ndarray:
        """The bias (classes,) to correct by; InputError where no class could be measured."""
        if self.bias.isnan().any():
            what = "no class has a contour both in the predictions for the trusted list and in its masks"
            remedy = "give the first training more --epochs or fewer --rounds, begin with --load, or look at the list"
            raise InputError(f"{what}, so the bias is not known; {remedy}")
        return self.bias.numpy()


def _labels(classes: int) -> range:
    return range(1, 2) if classes == 1 else range(classes)


def _distance(region: np.ndarray) -> np.ndarray:
    """`signed_distance` of (H, W) bool, infinite where there is no contour."""
    if region.all() or not region.any():
        return np.full(region.shape, -np.inf if region.all() else np.inf, np.float32)
    return signed_distance(region.astype(np.uint8))
