"""Distances to the contour of a region, and regions whose contour has moved."""

import cv2
import numpy as np


def signed_distance(region: np.ndarray) -> np.ndarray:
    """(H, W) {0, 1} -> float32 pixels to the contour, which lies between pixels: -0.5 just inside, 0.5 just outside."""
    inside, outside = (cv2.distanceTransform(m, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for m in (region, 1 - region))
    return np.where(region > 0, 0.5 - inside, outside - 0.5).astype(np.float32)


def around(region: np.ndarray, reach: int) -> tuple[slice, slice]:
    """Where a region (H, W) {0, 1} lies, and `reach` pixels (1 or more) around it.

    For a pixel in there the nearest ones inside and outside the region lie there too, so distances are exact.
    """
    x, y, width, height = cv2.boundingRect(region)
    return np.s_[max(0, y - reach) : y + height + reach, max(0, x - reach) : x + width + reach]


def moved(region: np.ndarray, shift) -> np.ndarray:
    """A region (H, W) {0, 1} with its contour moved outwards by `shift` pixels, a number or (H, W)."""
    new, near = np.zeros_like(region), around(region, max(1, int(np.ceil(np.max(shift)))))
    new[near] = signed_distance(region[near]) < (shift[near] if np.ndim(shift) else shift)
    return new
