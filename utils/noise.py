"""Label noise as annotators and tools make it, each kind at any strength, or at the strength that costs a given IoU.

A kind changes a mask (H, W) uint8 of class indices; one class means {0, 1}. What is random is drawn from the generator
in the same order at every strength, so that a larger strength is more of the same error. Pixels marked 255 stay.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from utils.contour import around, moved, signed_distance
from utils.images import IGNORE
from utils.scores import pair_scores
from utils.store import in_threads

CORRELATION = 0.05  # of the longer side: how far along a contour an error of `jitter` or `elastic` reaches
VARIANCE = 0.05  # of `markov`: the chance of a pixel on the contour to change in a step (theta 2 of the paper)
NEAR = 5e-4  # from the IoU that was asked for: no search goes on from there
_TRIES = 14  # strengths that are tried; six reach the largest
_BLOCK = 32  # steps of `markov` between two looks at where the region lies


class Kind(NamedTuple):
    """A kind of noise: what it does to one region or to a whole map, what its strength is, and the largest."""

    change: Callable
    unit: str
    most: float
    whole: bool = False  # changes all classes at once, with the image at hand
    imitates: str = ""


def apply_noise(
    mask: np.ndarray,
    kind: str,
    strength: float,
    rng: np.random.Generator,
    classes: int = 1,
    image: np.ndarray | None = None,
    matrix: np.ndarray | None = None,
) -> np.ndarray:
    """A noisy copy of a mask (H, W); the mask itself where the noise would leave a single class of several.

    Kinds of regions change the classes one after the other, in random order; what a class loses goes to the class
    nearest by. `image` (H, W, 3) is needed by `superpixel`, `matrix` (C, C), of the chances of a class to be labelled
    as another, can be given to `confusion`.
    """
    known = mask != IGNORE if classes > 1 else np.ones(mask.shape, bool)
    noisy = _change(mask, known, kind, strength, rng, classes, image, matrix)
    return mask.copy() if _count(noisy, known) < 2 <= _count(mask, known) else noisy


def _change(mask, known, kind, strength, rng, classes, image, matrix) -> np.ndarray:
    what = KINDS[kind]
    if strength <= 0:
        return mask.copy()
    if what.whole:
        noisy = what.change(mask, strength, rng, classes, image, matrix)
    else:
        noisy = mask.copy()
        for label in _labels(mask, classes, rng):
            noisy = _change_region(noisy, label, known, lambda region: what.change(region, strength, rng))
    return np.where(known, noisy, mask).astype(np.uint8)


def find_strength(pairs: list, kind: str, iou: float, classes=1, matrix=None, workers=0) -> tuple[float, float]:
    """The strength at which the mean IoU of noisy against clean masks comes nearest to `iou`, and the IoU reached.

    `pairs` are (mask, image or None, key of a generator), for `workers` threads (0: one a core). The strength, which
    may take time in proportion, is doubled until it costs enough, then bisected.
    """
    tried = {}

    def reached(strength):
        def one(pair):
            mask, image, key = pair
            known = mask != IGNORE if classes > 1 else np.ones(mask.shape, bool)
            # also what would take a class away, which is never used: else more noise could seem to cost less
            noisy = _change(mask, known, kind, strength, key(), classes, image, matrix)
            return pair_scores(noisy, mask, classes)["iou"]

        tried[strength] = float(np.mean(list(in_threads(one, pairs, workers))))
        return tried[strength]

    low, high = 0.0, KINDS[kind].most / 32
    while reached(high) > iou + NEAR and high < KINDS[kind].most:
        low, high = high, 2 * high
    while tried[high] < iou and len(tried) < _TRIES and min(abs(left - iou) for left in tried.values()) > NEAR:
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) > iou else (low, middle)
    return min(tried.items(), key=lambda one: (abs(one[1] - iou), one[0]))


def _labels(mask, classes, rng) -> list[int]:
    if classes == 1:
        return [1]
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=classes)[:classes])
    return rng.permutation(present).tolist()


def _count(mask, known) -> int:
    return len(np.unique(mask[known]))


def _change_region(mask, label, known, change) -> np.ndarray:
    region = (mask == label).astype(np.uint8)
    if not region.any() or region.all():
        return mask
    new = change(region)
    noisy = np.where((new > 0) & known, np.uint8(label), mask)
    lost = (region > 0) & (new == 0)
    if lost.any():
        others = (region > 0) | ~known
        if others.all():
            return mask
        _, nearest = cv2.distanceTransformWithLabels(
            others.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        label_of = np.zeros(nearest.max() + 1, np.uint8)
        label_of[nearest[~others]] = mask[~others]
        noisy[lost] = label_of[nearest[lost]]
    return noisy


def _erode(region, strength, _rng):
    return moved(region, -strength)


def _dilate(region, strength, _rng):
    return moved(region, strength)


def _both(region, strength, rng):
    return (_erode, _dilate)[rng.integers(2)](region, strength, rng)


def _smooth(shape, rng, count=1) -> np.ndarray:
    """(count, H, W) random fields of mean 0 and deviation 1 that are correlated over CORRELATION of the side."""
    sigma = CORRELATION * max(shape)
    fields = rng.standard_normal((count, *shape)).astype(np.float32)
    fields = np.stack([cv2.GaussianBlur(f, (0, 0), sigma, borderType=cv2.BORDER_REFLECT) for f in fields])
    return fields / fields.std((1, 2), keepdims=True)


def _jitter(region, strength, rng):
    return moved(region, strength * _smooth(region.shape, rng)[0])


def _markov(prefer_growth):
    def change(region, strength, rng):
        """Yao et al., "Learning to segment from noisy annotations", ICLR 2023, Definition 1 without random flips."""
        cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        now, steps = region.copy(), round(strength)
        for done in range(0, steps, _BLOCK):
            near = around(now, _BLOCK + 1)  # a step moves the contour by a pixel at most
            part = now[near].copy()
            for _ in range(min(_BLOCK, steps - done)):
                edge = np.flatnonzero((cv2.dilate if rng.random() < prefer_growth else cv2.erode)(part, cross) != part)
                part.ravel()[edge[rng.random(len(edge)) < VARIANCE]] ^= 1
            now[near] = part
        return (cv2.GaussianBlur(now * np.uint8(255), (5, 5), 2) > 127).astype(np.uint8)

    return change


def _polygon(region, strength, _rng):
    contours, tree = cv2.findContours(region, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    coarse = np.zeros_like(region)
    for hole in (False, True):  # holes last, so that nothing fills them
        for contour, (_, _, _, parent) in zip(contours, tree[0] if tree is not None else (), strict=False):
            if (parent >= 0) == hole:
                cv2.fillPoly(coarse, [cv2.approxPolyDP(contour, strength, True)], int(not hole))
    return coarse


def _missing(region, strength, rng):
    """Objects in random order until a share `strength` of the area is gone, the last one cut by a straight line."""
    count, parts = cv2.connectedComponents(region)
    order, angle = 1 + rng.permutation(count - 1), rng.uniform(0, 2 * np.pi)
    y, x = np.nonzero(region)
    rank = np.empty(count)
    rank[order] = np.arange(count - 1)
    along = x * np.cos(angle) + y * np.sin(angle)
    gone = np.lexsort((along, rank[parts[y, x]]))[: round(min(strength, 1) * len(y))]
    left = region.copy()
    left[y[gone], x[gone]] = 0
    return left


def _spurious(region, strength, rng):
    """A turned copy of the region, of `strength` times its area, at a random place."""
    height, width = region.shape
    angle, (cx, cy) = rng.uniform(0, 360), rng.uniform(0, 1, 2)
    y, x = np.nonzero(region)
    turn = cv2.getRotationMatrix2D((float(x.mean()), float(y.mean())), angle, float(np.sqrt(strength)))
    turn[:, 2] += cx * (width - 1) - x.mean(), cy * (height - 1) - y.mean()
    return region | cv2.warpAffine(region, turn, (width, height), flags=cv2.INTER_NEAREST)


def _towards(shape_of):
    def change(region, strength, _rng):
        target = np.zeros_like(region)
        count, parts = cv2.connectedComponents(region)
        for part in range(1, count):
            shape_of(target, np.column_stack(np.nonzero(parts == part))[:, ::-1].astype(np.int32))
        share, new, near = min(strength, 1.0), np.zeros_like(region), around(region | target, 1)
        new[near] = (1 - share) * signed_distance(region[near]) + share * signed_distance(target[near]) < 0
        return new

    return change


def _box(target, points):
    x, y, width, height = cv2.boundingRect(points)
    target[y : y + height, x : x + width] = 1


def _ellipse(target, points):
    centre, spread = points.mean(0), np.cov(points.T) + np.eye(2) / 12 if len(points) > 1 else np.eye(2) / 12
    # an ellipse with these second moments, and the box that it lies in
    low, high = (centre + way * 2 * np.sqrt(spread.diagonal()) for way in (-1, 1))
    ends = zip(low, high, target.shape[::-1], strict=True)
    x, y = (np.arange(max(0, int(first)), min(side, int(last) + 2)) for first, last, side in ends)
    grid = np.stack(np.meshgrid(x, y), -1) - centre
    target[y[0] : y[-1] + 1, x[0] : x[-1] + 1] |= ((grid @ np.linalg.inv(spread) * grid).sum(2) <= 4).astype(np.uint8)


def _affine(mask, strength, rng, _classes, _image, _matrix):
    """A shift by `strength` pixels, with a turn and a change of size that move the border of the image half as far."""
    direction, turn, zoom = rng.uniform(0, 2 * np.pi), *rng.uniform(-1, 1, 2)
    height, width = mask.shape
    half = max(mask.shape) / 2
    change = cv2.getRotationMatrix2D(
        (width / 2, height / 2), float(np.degrees(turn * strength / 2 / half)), float(1 + zoom * strength / 2 / half)
    )
    change[:, 2] += strength * np.cos(direction), strength * np.sin(direction)
    return _warp(mask, lambda m: cv2.warpAffine(m, change, (width, height), flags=0, borderMode=cv2.BORDER_REPLICATE))


def _elastic(mask, strength, rng, _classes, _image, _matrix):
    move = strength * _smooth(mask.shape, rng, 2)
    y, x = np.indices(mask.shape, np.float32)
    return _warp(
        mask, lambda m: cv2.remap(m, x + move[0], y + move[1], cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    )


def _warp(mask, move):
    moved = move(mask)
    return np.where(moved == IGNORE, mask, moved) if IGNORE in mask else moved


def _superpixel(mask, strength, _rng, classes, image, _matrix):
    """Every superpixel of about `strength` pixels across gets the label that most of it has."""
    from skimage.segmentation import slic

    count = max(2, round(mask.size / strength**2))
    parts = slic(image, n_segments=count, compactness=10, max_num_iter=4, start_label=0)
    votes = np.zeros((parts.max() + 1, IGNORE + 1), np.int64)
    np.add.at(votes, (parts.ravel(), mask.ravel()), 1)
    votes[:, IGNORE] = 0
    return votes.argmax(1).astype(np.uint8)[parts] if votes.any() else mask


def _confusion(mask, strength, rng, classes, _image, matrix):
    """Whole objects are labelled as another class, with the chance `strength`, or as `matrix` says times it."""
    noisy = mask.copy()
    for label in range(classes):
        count, parts = cv2.connectedComponents((mask == label).astype(np.uint8))
        for part in range(1, count):
            chance, choice = rng.random(2)
            row = np.full(classes, 1 / max(1, classes - 1)) if matrix is None else np.array(matrix[label], float)
            row[label] = 0
            row *= strength
            if chance < row.sum():
                noisy[parts == part] = np.searchsorted(np.cumsum(row) / row.sum(), choice)
    return noisy


KINDS = {
    "erode": Kind(_erode, "pixels", 60, imitates="masks that are too tight"),
    "dilate": Kind(_dilate, "pixels", 60, imitates="masks that are too wide"),
    "both": Kind(_both, "pixels", 60, imitates="either, by a fair coin for every object class"),
    "jitter": Kind(_jitter, "pixels", 60, imitates="an unsteady hand: correlated along the contour"),
    "markov": Kind(_markov(0.5), "steps", 2000, imitates="a random walk of the contour"),
    "markov_grow": Kind(_markov(0.8), "steps", 2000, imitates="a random walk that prefers to grow (published: 0.8)"),
    "markov_shrink": Kind(_markov(0.2), "steps", 2000, imitates="a random walk that prefers to shrink"),
    "polygon": Kind(_polygon, "pixels", 100, imitates="few clicks around the object"),
    "affine": Kind(_affine, "pixels", 100, True, "masks of another frame or view"),
    "elastic": Kind(_elastic, "pixels", 60, True, "masks warped from a template"),
    "missing": Kind(_missing, "of the area", 0.99, imitates="objects forgotten or cut off"),
    "spurious": Kind(_spurious, "of the area", 4, imitates="a region that is no object"),
    "box": Kind(_towards(_box), "of the way there", 1, imitates="boxes in place of masks"),
    "ellipse": Kind(_towards(_ellipse), "of the way there", 1, imitates="ellipses in place of masks"),
    "superpixel": Kind(_superpixel, "pixels", 200, True, "labels of superpixels"),
    "confusion": Kind(_confusion, "chance", 1, True, "objects labelled as another class"),
}
