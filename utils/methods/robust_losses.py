"""Losses that bear wrong labels better than cross entropy, `--loss`; each maps logits and masks to (N,) image losses.

Sources: GCE, the L_q loss of Zhang & Sabuncu, NeurIPS 2018. SCE, Wang et al., ICCV 2019. NR-Dice, Wang et al.
(COPLE-Net), IEEE TMI 2020. T-Loss, Gonzalez-Jimenez et al., MICCAI 2023.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.images import IGNORE
from utils.losses import per_image_loss, per_pixel_loss
from utils.methods.weighting import mean_of_pixels
from utils.points import PointLogits, parts, spread_points

LOG_ZERO = -4.0  # what SCE takes for log 0, A in the paper


def generalised_cross_entropy(ce: Tensor, q: float) -> Tensor:
    """(1 - p^q) / q of the label's probability p, given as its cross entropy -log p, any shape -> the same shape.

    `q` lies in [0, 1]: 0 is cross entropy, 1 is 1 - p, half the mean absolute error.
    """
    return ce if q == 0 else -torch.expm1(-q * ce) / q


def symmetric_cross_entropy(ce: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha CE + beta RCE from the cross entropy -log p of the label, any shape -> the same shape.

    The reverse cross entropy of a hard label is -A (1 - p), where A = -4 stands for log 0.
    """
    return alpha * ce + beta * LOG_ZERO * torch.expm1(-ce)


def noise_robust_dice(logits: Tensor, mask: Tensor, gamma: float = 1.5, eps: float = 1e-5) -> Tensor:
    """sum |p - g|^gamma / (sum p^2 + sum g^2 + eps) over the annotated pixels of every image, (N,) float32.

    Logits (N, 1, H, W) binary or (N, C, H, W), mask (N, H, W) uint8; `gamma` in [1, 2], 2 is the Dice loss with squared
    denominators. The paper has one class, the foreground. Of many it is the mean over those in the image's mask. A
    class without pixels has no minimum at p = 0 for gamma < 2, so the background stands for an empty binary mask.
    """
    p, g = _probabilities(logits, mask)
    area = g.sum((2, 3))
    each = (p - g).abs().pow(gamma).sum((2, 3)) / (p.square().sum((2, 3)) + area + eps)
    present = (area > 0).float()
    if logits.shape[1] == 1:
        present[:, 0] = 1 - present[:, 1]
    return (each * present).sum(1) / present.sum(1).clamp(min=1)


def t_loss(logits: Tensor, mask: Tensor, nu: Tensor) -> Tensor:
    """Minus the log density of an image's errors under a Student t with `nu` degrees of freedom, by their number, (N,).

    The errors, probability minus label at the D annotated pixels (times classes, where there are several), are one
    vector with identity covariance. Divided by D, which the paper does not do, so that learning rate and --clip-value
    mean what they mean with cross entropy. It can be negative, as any log density; 0 for an image without annotation.
    """
    p, g = _probabilities(logits, mask)
    start = 1 if logits.shape[1] == 1 else 0  # the background's errors are the foreground's once more
    square = (p - g)[:, start:].square().sum((1, 2, 3)).double()
    known = torch.ones_like(mask, dtype=torch.bool) if start else mask != IGNORE
    size, nu = known.sum((1, 2)).double() * (p.shape[1] - start), nu.double()
    # differences of numbers as large as D log D
    normalisation = torch.lgamma(nu / 2) - torch.lgamma((nu + size) / 2) + size / 2 * torch.log(math.pi * nu)
    density = normalisation + (nu + size) / 2 * torch.log1p(square / nu)
    return (density / size.clamp(min=1)).float()


def _probabilities(logits, mask):
    """Probabilities and labels of the classes, (N, C, H, W) float32 each, C = 2 for binary; 0 where not annotated."""
    logits = logits.float()
    if logits.shape[1] == 1:
        labels = mask[:, None].float()
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], 1), torch.cat([1 - labels, labels], 1)
    classes = torch.arange(logits.shape[1], device=mask.device)[:, None, None]
    return logits.softmax(1) * (mask != IGNORE)[:, None], (mask[:, None] == classes).float()


class CrossEntropy(nn.Module):
    """`per_image_loss`, and `per_pixel` for what needs a value of every pixel, (N, H, W)."""

    def per_pixel(self, logits: Tensor, mask: Tensor) -> Tensor:
        return per_pixel_loss(logits, mask)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        return per_image_loss(logits, mask)


class OfCrossEntropy(nn.Module):
    """A function of every pixel's cross entropy, 0 at 0, so that ignored pixels stay 0; the mean over an image's."""

    def __init__(self, function: Callable[[Tensor], Tensor], classes: int):
        super().__init__()
        self.function, self.classes = function, classes

    def per_pixel(self, logits: Tensor | PointLogits, mask: Tensor) -> Tensor:
        if isinstance(logits, PointLogits):
            return spread_points(self.per_pixel, logits, mask)
        return self.function(per_pixel_loss(logits, mask))

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        return mean_of_pixels(self.per_pixel(logits, mask), mask, self.classes)


class NoiseRobustDice(nn.Module):
    """`noise_robust_dice` with its exponent."""

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor | PointLogits, mask: Tensor) -> Tensor:
        return sum(noise_robust_dice(*pair, self.gamma) for pair in parts(logits, mask))


class TLoss(nn.Module):
    """`t_loss`, whose degrees of freedom exp(`free`) + 1e-8 are learnt with the network; `free` starts at 1, as there.

    The fewer they are, the less an image with large errors counts.
    """

    def __init__(self):
        super().__init__()
        self.free = nn.Parameter(torch.ones(()))

    @property
    def nu(self) -> Tensor:
        return self.free.exp() + 1e-8

    def forward(self, logits: Tensor | PointLogits, mask: Tensor) -> Tensor:
        return sum(t_loss(*pair, self.nu) for pair in parts(logits, mask))


def build_loss(args) -> nn.Module:
    """The loss of the flags: a module (logits, mask) -> (N,), with `per_pixel` where it is a mean over pixels."""
    if args.loss == "gce":
        return OfCrossEntropy(lambda ce: generalised_cross_entropy(ce, args.gce_q), args.classes)
    if args.loss == "sce":
        return OfCrossEntropy(lambda ce: symmetric_cross_entropy(ce, args.sce_alpha, args.sce_beta), args.classes)
    if args.loss == "nr_dice":
        return NoiseRobustDice(args.dice_gamma)
    return TLoss() if args.loss == "t_loss" else CrossEntropy()


def learnt(*losses: nn.Module) -> dict[str, float]:
    """What the losses of a run have learnt, for its log: `nu` of a T-Loss, `nu_a` and `nu_b` of two; else nothing."""
    values = [loss.nu.item() for loss in losses if isinstance(loss, TLoss)]
    return dict(zip(["nu"] if len(values) == 1 else ["nu_a", "nu_b"], values, strict=False))
