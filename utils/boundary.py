"""Boundaries of masks and how well two of them agree, for NumPy masks one by one and for batches on a device.

The score is the boundary F1 of Bokhovkin & Burnaev (2019) on hard masks: a mask's boundary is what a `theta0` box
erosion takes away, and a boundary pixel is matched within a `theta` box, (theta - 1) / 2 pixels in Chebyshev distance.
The image frame is not a boundary, and neither is the border of void (255). A boundary pixel without a match counts
nowhere if void is as near as a match could be: what it lacks may be hidden there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.images import IGNORE


def match_binary(pred: Tensor, mask: Tensor, theta0: int = 3, theta: int = 5) -> Tensor:
    """Areas, boundaries and their hits of two batches of masks, (N, H, W) bool, a bit each: (N, rows, pitch) uint8.

    Bits: 0 and 1 inside `pred` and `mask`, 2 and 3 on their boundaries, 4 and 5 hits of `pred` and of `mask`, 6 inside
    both. Rows and columns beyond the image are 0; `pitch` is a multiple of 8, so that eight pixels make an int64.
    """
    sheet = _Sheet(pred, max(theta0, theta))
    inside = torch.add(pred.view(torch.uint8), mask.view(torch.uint8), alpha=2)
    # bits 0 and 1 foreground, 2 and 3 background: around the image there is neither
    planes = sheet.lay(torch.rsub(inside, 12, alpha=3).add_((pred & mask).view(torch.uint8), alpha=64))
    edge = torch.zeros_like(planes)
    area, at_edge = sheet.inner(planes), sheet.inner(edge)
    torch.bitwise_and(sheet.grow(planes, theta0) >> 2, area, out=at_edge)
    hit = (sheet.grow(edge, theta) * 5 >> 1).bitwise_and_(at_edge)  # times 5, halved: the two low bits swapped
    return (area & 67).add_(at_edge, alpha=4).add_(hit, alpha=16).view(sheet.shape)


def match_classes(
    pred: Tensor, mask: Tensor, classes: int, theta0: int = 3, theta: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """What every pixel of two batches of labels, (N, H, W) uint8, is to the boundaries of its class, all at once.

    Three (2, N, rows, pitch) uint8 tensors, first of `pred`, then of `mask`: the label; 1 where it counts, 0 where
    `mask` is 255 and beyond the image; and 0 inside its class, 1 on its boundary, 2 there if the other's is near, but 0
    on a boundary that has void nearby instead of the other's.
    """
    sheet = _Sheet(pred, max(theta0, theta))
    void = torch.eq(mask, torch.full_like(mask, IGNORE)).view(torch.uint8)
    known = torch.bitwise_not(void.neg())
    high = torch.stack([pred, mask]) & known
    # void and frame are 0 in both, so that neither the largest label nearby nor the smallest is theirs
    flat = sheet.lay(torch.stack([high, high ^ known]))
    own, most = sheet.inner(flat), sheet.grow(flat, theta0, torch.maximum)
    label, other = own.view(2, -1)
    counts = (label | other) & 1
    edge = torch.ne(own, most).view(2, -1)
    edge = (edge[0] | edge[1]).byte() & counts
    # a label and 1 where it has a boundary, else 0; 255 in `pred` is no class
    marks = sheet.empty(2)
    torch.mul(label + 1, edge, out=sheet.inner(marks))
    if classes <= theta**2:
        hit = _hits_by_planes(sheet, marks, classes, theta)
    else:
        hit = _hits_by_offsets(sheet, marks, theta)
    judged = hit.view(2, -1) | (sheet.grow(sheet.lay(void), theta) ^ 1)
    edge, hit = (edge.view(2, -1) & judged).flatten(), hit.flatten()
    shape = 2, *sheet.shape
    return label.view(shape), counts.view(shape), (edge + (edge & hit)).view(shape)


def _hits_by_planes(sheet, marks, classes, theta):
    # one bit a class, eight at a time: the cost grows with the classes, and hardly with theta
    here, hit, one = sheet.inner(marks), 0, torch.ones((), dtype=torch.uint8)
    plane = torch.zeros_like(marks)
    for first in range(0, classes, 8):
        bit = sheet.inner(plane)
        torch.bitwise_left_shift(one, here - (first + 1), out=bit)  # 0 for a shift of 8 or more, also of a wrapped one
        near = sheet.grow(plane, theta).view(2, -1).flip(0).flatten()
        hit = hit | (near & bit)
    return hit.clamp_(max=1)


def _hits_by_offsets(sheet, marks, theta):
    # all labels at once, one neighbour at a time: the cost does not know the classes
    n = len(sheet.inner(marks)) // 2
    hit = torch.zeros_like(marks, dtype=torch.bool)
    start = sheet.first
    mine = marks[start + n : start + 2 * n]
    for offset in sheet.offsets(theta):
        same = torch.eq(marks[start + offset : start + offset + n], mine)
        hit[start + offset : start + offset + n] |= same
        hit[start + n : start + 2 * n] |= same
    return sheet.inner(hit).byte()


class _Sheet:
    """Batches of images in one row of bytes, zeros between and around them: a shift of all is one slice of the row."""

    def __init__(self, like: Tensor, width: int):
        n, h, w = like.shape
        self.size, self.device = (h, w), like.device
        self.high, self.wide = min(width // 2, h - 1), min(width // 2, w - 1)  # farther away there is nothing
        unit = 8 * -(-(w + self.wide) // 2000)
        self.shape = n, h + self.high, -(-(w + self.wide) // unit) * unit
        self.pitch = self.shape[2]
        self.first = (self.high + 1) * self.pitch

    def empty(self, batches: int) -> Tensor:
        length = 2 * self.first + batches * self.shape[0] * self.shape[1] * self.pitch
        return torch.zeros(length, dtype=torch.uint8, device=self.device)

    def lay(self, maps: Tensor) -> Tensor:
        """Maps (..., N, H, W) uint8 on a new sheet."""
        batches = maps.numel() // (self.shape[0] * self.size[0] * self.size[1])
        flat = self.empty(batches)
        inner = self.inner(flat).view(*maps.shape[:-2], *self.shape[1:])
        inner[..., : self.size[0], : self.size[1]].copy_(maps)
        return flat

    def inner(self, flat: Tensor) -> Tensor:
        """The sheet without what is before the first image and after the last."""
        return flat[self.first : len(flat) - self.first]

    def grow(self, flat: Tensor, width: int, join=torch.bitwise_or) -> Tensor:
        """All values in the width x width box around every pixel, joined; as `inner`, with leavings between images."""
        inner, begin = len(flat) - 2 * self.first, self.first
        for step, reach in ((1, min(width // 2, self.wide)), (self.pitch, min(width // 2, self.high))):
            begin, size = begin - reach * step, 1
            while size < 2 * reach + 1:
                more = min(size, 2 * reach + 1 - size)
                flat = join(flat[: -more * step], flat[more * step :])
                size += more
        return flat[begin : begin + inner]

    def offsets(self, width: int) -> list[int]:
        """How far away in the row the pixels of a width x width box are."""
        x, y = min(width // 2, self.wide), min(width // 2, self.high)
        return [dy * self.pitch + dx for dy in range(-y, y + 1) for dx in range(-x, x + 1)]


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
