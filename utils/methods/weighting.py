"""Weights of NLKD (ICASSP 2021): the teacher's judgement of an annotation mixed with the student's own.

One weight an image, as published, or one a pixel, as in the authors' later BAKD (2025).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.boundary import soft_boundary_f
from utils.images import IGNORE
from utils.losses import per_pixel_loss
from utils.metrics import sample_scores
from utils.points import dense


def mixing(epoch: float, epochs: int, warmup: float = 10, start: float = 0.05, end: float = 0.5) -> float:
    """The student's share T of the weight at `epoch` (from 0; fractions give a schedule per step).

    0 before `warmup`, then linear from `start` to `end`, reached in the last epoch. The paper calls T a distillation
    temperature. Defined for every number of epochs: without room for a ramp it is 0, with one epoch of it `start`.
    """
    if epoch < warmup or epochs <= warmup:
        return 0.0
    steps = epochs - warmup - 1
    return start + (end - start) * min(1.0, (epoch - warmup) / steps) if steps > 0 else start


def student_quality(pred: Tensor, mask: Tensor, quality: str, classes: int = 1, theta0=3, theta=5) -> Tensor:
    """How far the student's hard masks support the annotations: (N, H, W) uint8 each -> (N,) in [0, 1], no gradient."""
    with torch.no_grad():
        return sample_scores(pred, mask, classes, theta0, theta)[quality].float().clamp(0, 1)


def released_student_quality(logits: Tensor, mask: Tensor, theta0: int = 3, theta: int = 5) -> Tensor:
    """What the released code takes for the student's quality: boundary F1 of raw logits, gradient and all, (N,)."""
    return soft_boundary_f(dense(logits).float(), mask[:, None].float(), theta0, theta)


def mix_weights(teacher: Tensor, student: Tensor | None, share: float, floor: float = 0.0) -> Tensor:
    """w = T s + (1 - T) t, (N,), and no weight below `floor`; `student` may be None while T is 0."""
    weight = teacher if share == 0 or student is None else share * student + (1 - share) * teacher
    return weight.clamp(min=floor) if floor > 0 else weight


def weighted_mean(product: Tensor, weight: Tensor, normalise: str = "batch", mean_weight: Tensor | None = None):
    """Mean over the images of a batch of `product` = weight * loss, (N,) like `weight`.

    `normalise` "batch" divides by their number (published); "weight" by the sum of the weights, so that the step size
    does not follow how strict the score is. `mean_weight` replaces the batch's own mean there, for several processes.
    """
    total = product.sum() / len(product)
    if normalise == "batch":
        return total
    mean = weight.detach().mean() if mean_weight is None else mean_weight
    return total / mean.clamp(min=1e-6)


def effective_size(mean: float, mean_square: float, n: int) -> float:
    """How many equally weighted images carry as much: (sum w)^2 / sum w^2, from the means of w and of its square."""
    return n * mean**2 / mean_square if mean_square > 0 else 0.0


def given_probability(logits: Tensor, mask: Tensor) -> Tensor:
    """What a network finds the given label's probability to be, (N, H, W) float32, no gradient; 1 where void.

    `logits` is (N, 1, H, W) binary or (N, C, H, W), `mask` (N, H, W) uint8.
    """
    logits = dense(logits).detach().float()
    if logits.shape[1] == 1:
        return torch.where(mask == 1, logits[:, 0], -logits[:, 0]).sigmoid()
    void = mask == IGNORE
    chosen = logits.softmax(1).gather(1, mask.masked_fill(void, 0)[:, None].long())[:, 0]
    return chosen.masked_fill(void, 1.0)


def contour_trust(mask: Tensor, guard: float) -> Tensor:
    """1 - exp(-d / guard), (N, H, W) float32, for d pixels (Chebyshev) from a pixel's centre to the nearest contour of
    the mask (N, H, W) uint8: low beside a contour, which annotators draw a little off. The image frame is no contour,
    the border of void is one.
    """
    near = torch.ne(_box(mask), ~_box(~mask)).byte()  # the largest label nearby is not the smallest
    rings = max(0, math.ceil(-math.log(0.01) * guard - 0.5))  # farther away, nearer to 1 makes no difference
    reached = torch.zeros_like(mask, dtype=torch.int32)
    for ring in range(rings):
        near = _box(near) if ring else near
        reached += near
    # made on the device, which a copy of numbers would wait for: 1 for pixels never reached, the last ring's, ...
    distance = torch.arange(rings, -1, -1, dtype=torch.float64, device=mask.device) + 0.5
    trust = -torch.expm1(-distance / guard)
    trust[0] = 1
    return trust.float()[reached]


def _box(maps):
    """The largest value of the 3x3 box around every pixel, (N, H, W) uint8."""
    maps = F.pad(maps, (1, 1, 1, 1))
    maps = torch.maximum(torch.maximum(maps[:, :-2], maps[:, 1:-1]), maps[:, 2:])
    return torch.maximum(torch.maximum(maps[..., :-2], maps[..., 1:-1]), maps[..., 2:])


def pixel_weights(
    support: Tensor, student: Tensor | None, share: float, mask: Tensor, guard=1.0, floor=0.0, trust=None, sure=0.9
):
    """The weight of every pixel, (N, H, W) in [0, 1]: exp(-[T CE_student + (1 - T) CE_teacher]) = s^T t^(1 - T).

    `support` (N, H, W) uint8 is the teacher's p(given label) x 255, `student` the network's own (`given_probability`),
    which may be None while `share`, T, is 0. With a `guard` no weight exceeds `contour_trust`. Source: BAKD (2025).

    With the `trust` in every mask, (N,) in [0, 1], this project's own: pixels whose weight is `sure` or more count, the
    others as much as their mask is trusted.
    """
    weight = (support.float() / 255) ** (1 - share)
    if share > 0:
        weight = weight * student**share
    if trust is not None:
        weight = (weight >= sure).float()
    if guard > 0:
        weight = torch.minimum(weight, contour_trust(mask, guard))
    if trust is not None:
        weight = torch.maximum(weight, trust[:, None, None])
    return weight.clamp(min=floor) if floor > 0 else weight


def mean_of_pixels(values: Tensor, mask: Tensor, classes: int = 1) -> Tensor:
    """The mean of (N, H, W) values over every image's annotated pixels, (N,); 0 for an image without any."""
    if classes == 1:
        return values.mean((1, 2))
    known = mask != IGNORE
    return (values * known).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)


def weigh_pixels(logits: Tensor, batch: dict, share: float, args, loss=per_pixel_loss) -> tuple[Tensor, Tensor]:
    """Mean weight * loss and mean weight of every image's pixels, (N,) each, by the flags of a script.

    `loss` maps logits and mask to a value of every pixel, (N, H, W).
    """
    mask, trust = batch["mask"], batch.get("weight")
    student = given_probability(logits, mask) if share > 0 else None
    weight = pixel_weights(batch["support"], student, share, mask, args.guard, args.weight_floor, trust, args.sure)
    product = mean_of_pixels(weight * loss(logits, mask), mask, args.classes)
    return product, mean_of_pixels(weight, mask, args.classes)
