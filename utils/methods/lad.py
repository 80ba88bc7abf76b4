"""What a label-assisted teacher is shown of the label, and how its two views of it are made to agree.

Source: Qiu et al., "Make a strong teacher with label assistance", ECCV 2024, and its released code; `benchmarks/lad.md`
numbers the differences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.images import IGNORE
from utils.methods.distillation import channel_wise, dist, pixel_kl

GRID = (-1.1, 1.0)  # the first and last code of the released table, which has 22
SPREAD = 1.2


def label_codes(mask: Tensor, classes: int, kind: str, generator: torch.Generator | None = None) -> Tensor:
    """A number for every image and class, (N, classes + 1) float32; the last stands for void.

    `gaussian`: N(0, 1), drawn for each. `grid`: equal steps from -1.1 to 1, in another order for each image. `spread`:
    equal steps from -1.2 to 1.2 among the classes that an image has, in random order, so that they never come close.
    `fixed`: the grid, always in the order of the classes. `mask` (N, H, W) uint8.
    """
    shape, how = (len(mask), classes + 1), {"device": mask.device, "generator": generator}
    if kind == "gaussian":
        return torch.randn(shape, **how)
    grid = torch.linspace(*GRID, classes + 1, device=mask.device).expand(shape)
    if kind == "fixed":
        return grid
    chance = torch.rand(shape, **how)
    if kind == "grid":
        return grid.gather(1, chance.argsort(1))
    codes = _codes_of(mask, classes).flatten(1)
    there = torch.zeros(shape, dtype=torch.bool, device=mask.device).scatter_(1, codes, True)
    rank = chance.masked_fill(~there, 2).argsort(1).argsort(1)  # the classes of the image come first
    steps = (there.sum(1, keepdim=True) - 1).clamp(min=1)
    return torch.where(there, 2 * SPREAD * rank / steps - SPREAD, 0.0)


def noised_label(mask: Tensor, codes: Tensor, sigma: float, gain: float, pixels: Tensor, smooth: int = 0) -> Tensor:
    """gain (code of the pixel's class + sigma x pixels), (N, 1, H, W) float32: who belongs together, not who is what.

    `mask` (N, H, W) uint8, `codes` (N, classes + 1), `pixels` (N, 1, H, W) of N(0, 1); `smooth`: so many means over 3 x
    3 pixels before the noise. In units of a byte image, like the released gain of 100.
    """
    label = codes.gather(1, _codes_of(mask, codes.shape[1] - 1).flatten(1)).view_as(mask)[:, None]
    for _ in range(smooth):
        label = F.avg_pool2d(F.pad(label, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return gain * (label + sigma * pixels)


def agreement(one: Tensor, other: Tensor, kind: str, temperature: float = 4.0, valid: Tensor | None = None) -> Tensor:
    """The distances of each of two logits (N, C, h, w) to the other, taken as fixed, added; `kind` cwd, dist or kl."""
    if kind == "dist":
        return dist(one, other, valid=valid) + dist(other, one, valid=valid)
    distance = channel_wise if kind == "cwd" else pixel_kl
    return distance(one, other, temperature, valid) + distance(other, one, temperature, valid)


def _codes_of(mask, classes):
    """The column of every pixel's code: its class, or the last one where it is void."""
    return mask.long().where(mask != IGNORE, classes)
