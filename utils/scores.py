"""Scores of one pair of masks, on one core and without torch; the formulas are shared with the batches of a device.

The boundary score is the boundary F1 of Bokhovkin & Burnaev (2019) on hard masks: a mask's boundary is what a `theta0`
box erosion takes away, and a boundary pixel is matched within a `theta` box, (theta - 1) / 2 pixels in Chebyshev
distance. The image frame is not a boundary, and neither is the border of void (255). A boundary pixel without a match
counts nowhere if void is as near as a match could be: what it lacks may be hidden there.
"""

from __future__ import annotations

import threading
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from utils.images import IGNORE

if TYPE_CHECKING:
    from torch import Tensor

QUALITIES = ("miou", "bf", "bm", "iou", "dice")
_WORD = 64
_KEPT, _KEPT_PIXELS = 8, 2**20  # shapes whose scratch memory a thread keeps, and the largest of them


class BoundaryCounts(NamedTuple):
    """Pixels on either boundary, and how many of them lie within the tolerance of the other; ints, arrays, tensors."""

    pred: int | np.ndarray | Tensor
    mask: int | np.ndarray | Tensor
    pred_hit: int | np.ndarray | Tensor
    mask_hit: int | np.ndarray | Tensor


def pair_scores(pred: np.ndarray, mask: np.ndarray, classes: int = 1, theta0: int = 3, theta: int = 5) -> dict:
    """The scores of two (H, W) uint8 masks on the CPU: `binary_scores`, or for classes > 1 their class means.

    A class mean is over the classes present in either mask, those of `pred` where `mask` is not 255: what `mask` marks
    255 counts nowhere, and is 1 where there is nothing else.
    """
    if classes == 1:
        inter, of_pred, of_mask, *boundary = _count_pair(pred, mask, theta0, theta)
        return binary_scores(inter, of_pred, of_mask, mask.size, BoundaryCounts(*boundary))
    return _class_means(pred, mask, classes, theta0, theta)


def count_boundary(pred: np.ndarray, mask: np.ndarray, theta0: int = 3, theta: int = 5) -> BoundaryCounts:
    """Boundary counts of two (H, W) uint8 {0, 1} masks on the CPU."""
    return BoundaryCounts(*_count_pair(pred, mask, theta0, theta)[3:])


def count_pair(pred: np.ndarray, mask: np.ndarray, theta0: int = 3, theta: int = 5) -> list[int]:
    """What all scores of two (H, W) uint8 {0, 1} masks are made of; `scores_of_counts` takes many at once."""
    return [mask.size, *_count_pair(pred, mask, theta0, theta)]


def scores_of_counts(counts: np.ndarray) -> np.ndarray:
    """(..., 8) numbers of `count_pair` -> (..., 5) scores in the order of QUALITIES."""
    pixels, inter, of_pred, of_mask, *boundary = np.moveaxis(counts, -1, 0)
    found = binary_scores(inter, of_pred, of_mask, pixels, BoundaryCounts(*boundary))
    return np.stack([found[name] for name in QUALITIES], -1)


def ratio(part, whole):
    """part / whole, and 1 where there is nothing of either; ints, arrays or tensors."""
    nothing = whole == 0
    return (part + nothing) / (whole + nothing)


def boundary_f(counts: BoundaryCounts, iou):
    """F1 of boundary precision and recall in [0, 1]; 0 for one boundary against none.

    Where neither mask has a boundary that counts, their `iou` stands in: 1 for two empty or two full masks, 0 for one
    of each, and in between only where void hides the boundaries. Works on ints, arrays and tensors; the published code
    adds 1e-7 to every denominator, which is below 1e-6 here.
    """
    top = 2 * counts.pred_hit * counts.mask_hit
    bottom = counts.pred_hit * counts.mask + counts.mask_hit * counts.pred
    bare = (counts.pred == 0) & (counts.mask == 0)
    return (top + bare * iou) / (bottom + (bottom == 0))


def binary_scores(inter, pred, mask, pixels, boundary: BoundaryCounts) -> dict:
    """Every score of binary masks from pixel counts (intersection, predicted, annotated, all), each in [0, 1].

    `iou` and `dice` are of the foreground, `miou` the mean over foreground and background, `bf` the boundary F1,
    `bm` = (bf + miou) / 2. Two empty masks agree: 1.
    """
    iou = ratio(inter, pred + mask - inter)
    background = ratio(pixels - pred - mask + inter, pixels - inter)
    bf, miou = boundary_f(boundary, iou), (iou + background) / 2
    return {"iou": iou, "miou": miou, "dice": ratio(2 * inter, pred + mask), "bf": bf, "bm": (bf + miou) / 2}


def _count_pair(pred, mask, theta0, theta) -> list[int]:
    """Pixels of: intersection, pred, mask, boundary of pred, of mask, pred's hits, mask's hits."""
    reach = [min(box // 2, max(mask.shape)) for box in (theta0, theta)]  # beyond the image a box sees nothing new
    if 2 * sum(reach) > _WORD - 8:
        return _count_filtered(pred, mask, theta0, theta)
    key = (*mask.shape, *reach)
    packed = _scratch.packed.get(key)
    if packed is None:
        packed = _Packed(*key)
        if mask.size <= _KEPT_PIXELS:
            if len(_scratch.packed) == _KEPT:
                _scratch.packed.clear()
            _scratch.packed[key] = packed
    return packed.count(pred, mask)


class _Packed:
    """Scratch memory and the list of array operations that count pairs of (height, width) masks, a bit a pixel.

    A word holds a stretch of a row and, at both of its ends, copies of as many neighbouring pixels as the boxes reach:
    so boxes grow by shifts inside words, without carries. Rows of zeros between the masks do the same for columns.
    """

    def __init__(self, height: int, width: int, reach0: int, reach: int):
        step = (_WORD - 2 * (reach0 + reach)) // 8  # bytes from one word to the next
        lead = (_WORD - 8 * step) // 2
        words = -(-width // (8 * step))
        apart = max(reach0, reach)
        self._shape, self._step = (height, words), step
        self._pixels = np.zeros((height, 8 * (words * step + 8 - step)), np.uint8)
        self._inside = self._pixels[:, lead : lead + width]
        size = (height + apart) * words
        self._sets = np.zeros((7, size), np.uint64)
        self._ones = np.zeros((7, size), np.uint8)
        both, edge, hit = self._sets[1:3], self._sets[3:5], self._sets[5:7]
        self._rows = [m.reshape(-1, words)[:height] for m in both]
        frame = np.zeros(size, np.uint64)
        self._pack(np.uint8(1), frame.reshape(-1, words)[:height])
        buffers = [np.zeros(apart * words + 2 * size, np.uint64) for _ in range(2)]
        one, two = (b[apart * words :].reshape(2, size) for b in buffers)

        self._steps = [(np.bitwise_and, both[0], both[1], self._sets[0]), (np.bitwise_xor, both, frame, one)]
        near = self._grow(one, reach0, words, buffers, (one, two))
        self._steps.append((np.bitwise_and, both, near, edge))
        near = self._grow(edge, reach, words, buffers, (one, two))
        counted = np.uint64((1 << 8 * step) - 1 << lead)
        self._steps += [(np.bitwise_and, edge, near[::-1], hit), (np.bitwise_and, self._sets, counted, self._sets)]

    def count(self, pred: np.ndarray, mask: np.ndarray) -> list[int]:
        self._pack(pred, self._rows[0])
        self._pack(mask, self._rows[1])
        for operation, left, right, out in self._steps:
            operation(left, right, out)
        np.bitwise_count(self._sets, self._ones)
        return cv2.reduce(self._ones, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel().tolist()

    def _pack(self, mask, rows) -> None:
        self._inside[...] = mask
        (height, words), step = self._shape, self._step
        line = self._pixels.shape[1] // 8
        rows[...] = np.ndarray((height, words), "<u8", np.packbits(self._pixels, bitorder="little"), 0, (line, step))

    def _grow(self, source, reach, words, buffers, bodies) -> np.ndarray:
        """Note the steps that make a (2 reach + 1) box of every pixel of `source`; returns where the result will be."""
        one, two = bodies
        for back, length in _strides(reach):
            shift = np.right_shift if back else np.left_shift
            self._steps += [(shift, source, np.uint64(length), two), (np.bitwise_or, source, two, one)]
            source = one
        spilled = buffers[0][: -bodies[0].size]  # what an earlier box left above the first mask
        self._steps.append((np.bitwise_and, spilled, np.uint64(0), spilled))
        for back, length in _strides(reach):
            low, high = slice(None, -length * words), slice(length * words, None)
            self._steps.append((np.bitwise_or, buffers[0][low], buffers[0][high], buffers[1][low if back else high]))
            buffers, source, bodies = buffers[::-1], bodies[1], bodies[::-1]
        return source


def _strides(reach: int) -> list[tuple[int, int]]:
    """(direction, length) of the steps that grow a pixel to 2 reach + 1: none is longer than what is grown already."""
    left, grown, way, steps = [reach, reach], 1, 0, []
    while any(left):
        length = min(grown, left[way])
        if length:
            steps.append((way, length))
        left[way] -= length
        grown += length
        way = 1 - way
    return steps


class _Scratch(threading.local):
    def __init__(self):
        self.packed = {}


_scratch = _Scratch()


def _count_filtered(pred, mask, theta0, theta) -> list[int]:
    """As `_Packed.count`, for boxes that do not fit into a word."""
    small, wide = (np.ones((box, box), np.uint8) for box in (theta0, theta))
    edge_pred, edge_mask = (cv2.subtract(m, cv2.erode(m, small)) for m in (pred, mask))
    hits = (
        cv2.bitwise_and(edge_pred, cv2.dilate(edge_mask, wide)),
        cv2.bitwise_and(edge_mask, cv2.dilate(edge_pred, wide)),
    )
    return [cv2.countNonZero(m) for m in (cv2.bitwise_and(pred, mask), pred, mask, edge_pred, edge_mask, *hits)]


def _class_means(pred, mask, classes, theta0, theta) -> dict:
    # All classes at once on the maps of labels, so that the cost does not grow with the number of classes.
    pred, mask = np.ascontiguousarray(pred), np.ascontiguousarray(mask)
    known = mask != IGNORE
    edges = [_label_edges(m, known, theta0) for m in (pred, mask)]
    near_void = None if known.all() else cv2.dilate(np.uint8(1) - known, np.ones((theta, theta), np.uint8)).ravel() > 0
    edge_labels, hit_labels = [], []
    for own, other, edge, other_edge in ((pred, mask, *edges), (mask, pred, *edges[::-1])):
        at = np.flatnonzero(edge)
        labels = own.ravel()[at]
        hit = _label_hits(labels, at, other, other_edge, theta)
        hit_labels.append(labels[hit])
        edge_labels.append(labels if near_void is None else labels[hit | ~near_void[at]])
    areas = mask[(pred == mask) & known], pred[known], mask[known]
    counts = [_count_labels(m)[:classes] for m in (*areas, *edge_labels, *hit_labels)]
    present = counts[1] + counts[2] > 0
    inter, of_pred, of_mask, *boundary = (c[present] for c in counts)
    each = binary_scores(inter, of_pred, of_mask, areas[1].size, BoundaryCounts(*boundary))
    iou, dice, bf = (float(ratio(each[name].sum(), present.sum())) for name in ("iou", "dice", "bf"))
    return {"iou": iou, "miou": iou, "dice": dice, "bf": bf, "bm": (bf + iou) / 2}


def _label_edges(labels, known, theta0) -> np.ndarray:
    """(H, W) bool: pixels that count and have one that counts, of another label, in their box."""
    return np.not_equal(*_range_around(labels, known, theta0)) & known


def _label_hits(own, at, other, other_edge, theta) -> np.ndarray:
    """Whether an edge pixel of `other` in the box of each pixel `at` (flat) has its label, `own`, too; (n,) bool."""
    low, high = (m.ravel()[at] for m in _range_around(other, other_edge, theta))
    # `high` is 0 beside label 0 and far from any edge alike; only `low` can tell
    found = (own == low) | ((own == high) & (own > 0))
    unclear = np.flatnonzero((low < own) & (own < high))
    if len(unclear):
        found[unclear] = _look_around(own[unclear], at[unclear], other, other_edge, theta // 2)
    return found


def _range_around(labels, where, width) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest label that `where` allows in the box of every pixel; 255 and 0 for none."""
    box, allowed = np.ones((width, width), np.uint8), np.negative(where.view(np.uint8))
    return cv2.erode(labels | ~allowed, box), cv2.dilate(labels & allowed, box)


def _look_around(own, at, other, other_edge, reach) -> np.ndarray:
    """Whether each of the pixels `at` (flat) has its own label among the edge pixels of `other` in its box."""
    height, width = other.shape
    y, x = np.divmod(at, width)
    down, right = (min(reach, side - 1) for side in (height, width))
    # a frame of no edge, and flat positions: no pixel has to be asked whether it still is inside
    line = width + 2 * right
    padded = np.full((height + 2 * down, line), IGNORE, np.uint8)
    padded[down : down + height, right : right + width] = np.where(other_edge, other, IGNORE)
    padded, at = padded.ravel(), (y + down) * line + x + right
    found, rest = np.zeros(len(own), bool), np.arange(len(own))
    steps = product(range(-down, down + 1), range(-right, right + 1))
    for dy, dx in sorted(steps, key=lambda step: max(map(abs, step))):
        hit = padded[at + (dy * line + dx)] == own
        if hit.any():
            found[rest[hit]] = True
            at, own, rest = at[~hit], own[~hit], rest[~hit]
            if not len(rest):
                break
    return found


def _count_labels(labels) -> np.ndarray:
    """(n,) uint8 -> (256,) how often every label occurs."""
    if not labels.size:
        return np.zeros(256, np.int64)
    return cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel().astype(np.int64)
