"""A few pixels of every image that a network looks at again (PointRend), and how they enter losses and masks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.images import IGNORE


class PointLogits(NamedTuple):
    """What a network in training says about whole images and, in a second look, about some of their pixels.

    `whole` (N, C, H, W) and `points` (N, C, P) are logits; `at` (N, P) int64 is where the points lie, y W + x, and may
    hold a pixel twice.
    """

    whole: Tensor
    points: Tensor
    at: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.whole.shape


def dense(logits: Tensor | PointLogits) -> Tensor:
    """The map (N, C, H, W) of the network's last word on every pixel: points take the place of what they improve."""
    if not isinstance(logits, PointLogits):
        return logits
    whole, points, at = logits
    at = at[:, None].expand(-1, points.shape[1], -1)
    return whole.flatten(2).scatter(2, at, points.to(whole.dtype)).view_as(whole)


def parts(logits: Tensor | PointLogits, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a loss of images is to be summed over: (logits (N, C, h, w), mask (N, h, w)), the points as P x 1 images.

    So the loss of PointRend is the coarse map's plus the points', whatever the loss.
    """
    if not isinstance(logits, PointLogits):
        return [(logits, mask)]
    labels = mask.flatten(1).gather(1, logits.at)
    return [(logits.whole, mask), (logits.points[..., None], labels[..., None])]


def spread_points(loss: Callable[[Tensor, Tensor], Tensor], logits: PointLogits, mask: Tensor) -> Tensor:
    """A loss of pixels, (logits, mask) -> (N, H, W), of the whole map, and on top that of the points where they lie.

    Scaled so that an image's mean over its annotated pixels is the sum of both means.
    """
    pairs = parts(logits, mask)
    whole, points = (loss(*pair) for pair in pairs)
    known = [torch.ones_like(m) if logits.shape[1] == 1 else m != IGNORE for _, m in pairs]
    pixels, count = (k.flatten(1).sum(1, keepdim=True) for k in known)
    share = points.flatten(1) * (pixels / count.clamp(min=1))
    return whole.flatten(1).scatter_add(1, logits.at, share).view_as(whole)


def uncertainty(logits: Tensor) -> Tensor:
    """How undecided logits (N, C, ...) are, (N, ...), 0 at most: -|z| for one plane, else the second largest - largest.

    Section 3.1 of the paper for one class (-|p - 0.5| orders as -|z|), section 5 for several, of logits as in its code.
    """
    if logits.shape[1] == 1:
        return -logits[:, 0].abs()
    first, second = logits.topk(2, 1).values.unbind(1)
    return second - first


@torch.no_grad()
def draw_points(logits: Tensor, count: int, oversampling: int = 3, importance: float = 0.75) -> Tensor:
    """Pixels to train on, (N, `count`) int64: of `oversampling` x count drawn uniformly the most uncertain
    `importance` x count, the rest uniform again. Drawn by torch's generator of the device; section 3.1 of the paper.
    """
    n, _, h, w = logits.shape
    pool = torch.randint(h * w, (n, oversampling * count), device=logits.device)
    best = round(importance * count)
    chosen = uncertainty(logits).flatten(1).gather(1, pool).topk(best, 1).indices
    rest = torch.randint(h * w, (n, count - best), device=logits.device)
    return torch.cat([pool.gather(1, chosen), rest], 1)


def sample(maps: Tensor, at: Tensor, height: int, width: int) -> Tensor:
    """Maps (N, C, h, w) at the centres of pixels `at` (N, P) of a height x width image, (N, C, P) float32, bilinear.

    A map is stretched over the image, and beyond the centres of its outer cells goes on as they are.
    """
    row = at // width
    column = at - row * width  # not by %, which ONNX cannot take by a width that it does not know
    grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], -1)[:, :, None]
    return F.grid_sample(maps.float(), grid, padding_mode="border", align_corners=False)[..., 0]
