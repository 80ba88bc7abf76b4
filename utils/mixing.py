"""Mixing the images of a batch on its device: CutMix, ClassMix and Cutout, each as a mask of what an image keeps.

Drawn from torch's generators, which `Run.batches` seeds at every step.
"""

import torch
from torch import Tensor

from utils.images import IGNORE


def draw_mask(kind: str, label: Tensor, classes: int) -> Tensor:
    """Which pixels every image keeps, (N, H, W) bool, on the device of `label` (N, H, W) int64.

    "cutmix" and "cutout" (DeVries and Taylor 2017; French et al., BMVC 2020): all but a rectangle of half the area.
    "classmix" (Olsson et al., WACV 2021): half of the classes of its label, rounded down.
    """
    if kind == "classmix":
        return _half_of_the_classes(label, classes)
    return ~rectangles(*label.shape, label.device)


def rectangles(count: int, height: int, width: int, device=None) -> Tensor:
    """Rectangles of half the area at random places, (count, height, width) bool, each at least half as wide as all."""
    wide = torch.randint(width // 2 + 1, max(width, width // 2 + 2), (count,)).clamp(max=width)
    high = (height * width / 2 / wide).round().long().clamp(max=height)
    top = (torch.rand(count) * (height - high + 1)).long()
    left = (torch.rand(count) * (width - wide + 1)).long()
    top, high, left, wide = torch.stack([top, high, left, wide]).to(device, non_blocking=True)[..., None, None]
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    return (row >= top) & (row < top + high) & (column >= left) & (column < left + wide)


def mix(values: Tensor, keep: Tensor) -> Tensor:
    """Each image where `keep` (N, H, W), elsewhere the next one of the batch; values (N, H, W) or (N, C, H, W)."""
    keep = keep if values.dim() == 3 else keep[:, None]
    return torch.where(keep, values, values.roll(-1, 0))


def cut(image: Tensor, label: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Cutout: outside `keep` (N, H, W) the image (N, C, H, W) is 0 and its label (N, H, W) is 255."""
    return image.masked_fill(~keep[:, None], 0), label.masked_fill(~keep, IGNORE)


def to_grid(values: Tensor, size) -> Tensor:
    """(..., H, W) -> (..., *size) by the nearest pixel: row floor(i H / h), column floor(j W / w)."""
    rows, columns = (
        torch.arange(new, device=values.device) * old // new for new, old in zip(size, values.shape[-2:], strict=True)
    )
    return values[..., rows[:, None], columns]


def _half_of_the_classes(label, classes):
    seen = (label.flatten(1)[:, :, None] == torch.arange(classes, device=label.device)).any(1)
    order = torch.rand(seen.shape, device=label.device).masked_fill(~seen, 2).argsort(1).argsort(1)
    kept = order < seen.sum(1, keepdim=True) // 2
    kept = torch.cat([kept, kept.new_zeros(len(kept), IGNORE + 1 - classes)], 1)  # 255 is no class
    return kept.gather(1, label.flatten(1)).view_as(label)
