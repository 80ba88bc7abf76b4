"""A mask drawn over its photograph."""

import colorsys

import cv2
import numpy as np

OPACITY = 0.45  # of the tint


def palette(classes: int) -> np.ndarray:
    """(classes, 3) uint8 RGB: black for class 0, then colours as different from those before as can be; 1 counts as 2.

    Class k has the hue k times the golden ratio, in turns bright, dark and pale.
    """
    tones = [(1.0, 1.0), (0.9, 0.65), (0.5, 1.0)]
    golden = (5**0.5 - 1) / 2
    rows = [colorsys.hsv_to_rgb((0.97 + (k - 1) * golden) % 1, *tones[(k - 1) // 7 % 3]) for k in range(1, classes)]
    return (np.array([(0, 0, 0), *(rows or [colorsys.hsv_to_rgb(0.97, 1, 1)])]) * 255).round().astype(np.uint8)


def draw_overlay(image: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """(H, W, 3) RGB: the image with every class but 0 tinted in its colour of `palette`, its contour drawn solid."""
    colours = palette(classes)
    width = max(1, round(min(mask.shape) / 300))
    inside = mask > 0
    shown = image.copy()
    tint = cv2.addWeighted(image, 1 - OPACITY, colours[mask], OPACITY, 0)
    shown[inside] = tint[inside]
    shape = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    # at the border of the image there is no contour: the object goes on there
    edge = inside & (cv2.erode(mask, shape, borderType=cv2.BORDER_REPLICATE) != mask)
    edge |= inside & (cv2.dilate(mask, shape, borderType=cv2.BORDER_REPLICATE) != mask)
    shown[edge] = colours[mask[edge]]
    return shown
