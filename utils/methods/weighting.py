"""Sample weights of NLKD (ICASSP 2021): the teacher's judgement of an annotation mixed with the student's own."""

import torch
from torch import Tensor

from utils.boundary import soft_boundary_f
from utils.metrics import sample_scores


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
    return soft_boundary_f(logits.float(), mask[:, None].float(), theta0, theta)


def mix_weights(teacher: Tensor, student: Tensor | None, share: float, floor: float = 0.0) -> Tensor:
    """w = T s + (1 - T) t, (N,), and no weight below `floor`; `student` may be None while T is 0."""
    weight = teacher if share == 0 or student is None else share * student + (1 - share) * teacher
    return weight.clamp(min=floor) if floor > 0 else weight


def weighted_loss(loss: Tensor, weight: Tensor, normalise: str = "batch", mean_weight: Tensor | None = None) -> Tensor:
    """Mean of weight * loss over the images of a batch, both (N,).

    `normalise` "batch" divides by their number (published); "weight" by the sum of the weights, so that the step size
    does not follow how strict the score is. `mean_weight` replaces the batch's own mean there, for several processes.
    """
    total = (weight * loss).sum() / len(loss)
    if normalise == "batch":
        return total
    mean = weight.detach().mean() if mean_weight is None else mean_weight
    return total / mean.clamp(min=1e-6)


def effective_size(mean: float, mean_square: float, n: int) -> float:
    """How many equally weighted images carry as much: (sum w)^2 / sum w^2, from the means of w and of its square."""
    return n * mean**2 / mean_square if mean_square > 0 else 0.0
