"""Early-learning correction (ADELE): when a class begins to memorise its labels, and what they are corrected to.

Source: Liu et al., "Adaptive early-learning correction for segmentation from noisy annotations", CVPR 2022, and where
it leaves details open the authors' code, as benchmarks/corrections.md says. Class 0 is the background, which has no
curve, unless a run says otherwise.
"""

import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import OptimizeWarning, curve_fit
from torch import Tensor, nn

from utils.images import IGNORE
from utils.losses import hard
from utils.points import dense

FEWEST = 4  # epochs that a curve of three parameters is fitted to


def learning_curve(epoch, a: float, b: float, c: float):
    """The training IoU after `epoch` epochs (from 1), a (1 - exp(-b t^c))."""
    return a * -np.expm1(-b * np.power(epoch, c))


def fit_curve(ious: np.ndarray) -> tuple[float, float, float] | None:
    """(a, b, c) of the least-squares `learning_curve` of the IoU of every epoch, a and c in [0, 1], b >= 0.

    As in the authors' code later epochs count more: their deviation falls from 1 to 0.1, evenly in its logarithm.
    Negative for epochs without the class. None for fewer than four epochs, for a class that was never hit, or where no
    curve is found.
    """
    known = ious >= 0
    if known.sum() < FEWEST or ious.max() <= 0:
        return None
    epochs, ious = np.arange(1.0, len(ious) + 1)[known], ious[known]
    start = (float(np.clip(ious.max(), 1e-3, 1)), 1.0, 1.0)
    bounds, deviation = ([0, 0, 0], [1, np.inf, 1]), np.geomspace(1, 0.1, len(ious))
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # says that the fit is exact
        try:
            found, _ = curve_fit(learning_curve, epochs, ious, start, deviation, bounds=bounds, max_nfev=10_000)
        except (RuntimeError, ValueError):  # no minimum; a value that is not finite on the way
            return None
    return tuple(found.tolist())


def slope_change(curve: tuple[float, float, float], epoch: int) -> float:
    """How far the slope of a `learning_curve` has fallen since epoch 1, |f'(1) - f'(t)| / |f'(1)|.

    In [0, 1]; 0 for a curve without slope, and for a slope that has risen (c above 1, which is never fitted).
    """
    a, b, c = curve

    def slope(t):
        return a * b * c * t ** (c - 1) * math.exp(-min(b * t**c, 700.0))

    first = slope(1.0)
    return max(0.0, 1 - slope(float(epoch)) / first) if first > 0 else 0.0


def at_scales(net, image: Tensor, scales) -> list[Tensor]:
    """Logits of a network that sees the images (N, 3, H, W) enlarged by each scale, brought back to (H, W)."""
    shape, found = image.shape[2:], []
    for scale in scales:
        size = [max(1, round(scale * side)) for side in shape]
        seen = F.interpolate(image.float(), size, mode="bilinear", antialias=scale < 1)
        found.append(F.interpolate(dense(net(seen)).float(), shape, mode="bilinear"))
    return found


def scale_divergence(every: list[Tensor], mask: Tensor, confidence: float = 0.8) -> Tensor:
    """The mean KL(p_k || q) over scales k and pixels, q the mean of the p_k, (N,) float32.

    `every` has the logits of each scale, (N, 1, H, W) or (N, C, H, W), `mask` is (N, H, W) uint8. 0 for an image on
    whose annotated pixels q is nowhere as sure as `confidence`, as in the authors' code.
    """
    logs = torch.stack([log_probabilities(logits) for logits in every])
    mean = logs.logsumexp(0) - math.log(len(every))
    divergence = (logs.exp() * (logs - mean)).sum(2).mean((0, 2, 3))
    sure = mean.exp().amax(1).masked_fill(mask == IGNORE, 0)
    return divergence * (sure.amax((1, 2)) >= confidence)


def log_probabilities(logits: Tensor) -> Tensor:
    """Of all classes, (N, C, H, W) float32; two for logits of one channel."""
    logits = dense(logits).float()
    both = torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], 1) if logits.shape[1] == 1 else None
    return logits.log_softmax(1) if both is None else both


def class_overlaps(logits: Tensor, mask: Tensor, first: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """{"iou_k": (intersection, union)} in pixels of the hard masks with a batch's masks, for classes k from `first`."""
    pred, classes = hard(logits), max(2, logits.shape[1])
    pairs = mask.long() * classes + pred
    if logits.shape[1] > 1:
        pairs = pairs.masked_fill(mask == IGNORE, classes**2)
    ones = torch.ones((), dtype=torch.int64, device=pairs.device).expand(pairs.numel())
    counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=pairs.device).scatter_add_(0, pairs.flatten(), ones)
    counts = counts[:-1].view(classes, classes)
    inter = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - inter
    return {f"iou_{k}": (inter[k], union[k]) for k in range(first, classes)}


def correct_masks(
    mask: Tensor, probability: Tensor, turn: list[int], threshold: float, background: bool = True
) -> Tensor:
    """Masks (N, H, W) uint8 corrected by probabilities (N, C, H, W), once the classes `turn` have had their turn.

    A pixel becomes its most probable class, whatever its label, where that is more probable than `threshold`, one of
    `turn` or the background, and there in the image's mask: a correction moves classes. 255 stays. An image without any
    of these classes stays; one of background alone, in which they may have been missed, does not, and may get each.
    Nor does an image change that would lose more than half of its foreground and keep less than 5 %.
    Without `background` class 0 is one like the others, and neither exception holds.
    """
    sure, pred = probability.max(1)
    may = torch.zeros(IGNORE + 1, dtype=torch.bool, device=mask.device)
    may[turn] = True
    there = torch.zeros(len(mask), IGNORE + 1, dtype=torch.bool, device=mask.device)
    there = there.scatter_(1, mask.flatten(1).long(), True)
    concerned = there[:, turn].any(1)
    if background:
        empty = ~there[:, 1:IGNORE].any(1)
        concerned |= empty
        there |= empty[:, None]
        may[0], there[:, 0] = True, True
    change = (sure > threshold) & (mask != IGNORE) & may[pred] & concerned[:, None, None]
    change &= there.gather(1, pred.flatten(1)).view_as(pred)
    after = torch.where(change, pred.byte(), mask)
    return torch.where(_nearly_gone(mask, after)[:, None, None], mask, after) if background else after


def _nearly_gone(before, after):
    """Whether an image has less than half of its foreground left and that is less than 5 % of its annotated pixels."""
    known = before != IGNORE
    had, has = (((mask != 0) & known).sum((1, 2)) for mask in (before, after))
    return (2 * has < had) & (20 * has < known.sum((1, 2)))


class EarlyLearning(nn.Module):
    """What a run has learnt about its classes and labels, all of it in buffers that its checkpoints save.

    `history` (epochs, classes): training IoU, -1 where unknown; `corrected` (classes,): the epoch, from 1, after which
    a class was corrected first, 0: not yet; `version` (images,): the epoch of the corrected mask that an image has, 0:
    the given one. `version` is in shared memory, so that loader processes see it. With `background` class 0 has no
    curve and no turn.
    """

    def __init__(self, epochs: int, classes: int, images: int, background: bool = True):
        super().__init__()
        self.first = int(background)
        self.register_buffer("history", torch.full((epochs, max(2, classes)), -1.0, dtype=torch.float64))
        self.register_buffer("corrected", torch.zeros(max(2, classes), dtype=torch.int32))
        self.register_buffer("version", torch.zeros(images, dtype=torch.int32).share_memory_())

    def done(self) -> list[int]:
        """The classes that have had their turn."""
        return self.corrected.nonzero().flatten().tolist()

    def fit(self, epoch: int, means: dict[str, float]) -> dict:
        """Note the IoUs of an epoch (from 0), {"train_iou_k": IoU}, and fit the curve of every class left to correct.

        Returns what to log: `curve_k`, [a, b, c], and `slope_change_k`.
        """
        found = {}
        for k in range(self.first, self.history.shape[1]):
            self.history[epoch, k] = means.get(f"train_iou_{k}", -1.0)
            curve = None if self.corrected[k] else fit_curve(self.history[: epoch + 1, k].numpy())
            if curve:
                found |= {f"curve_{k}": list(curve), f"slope_change_{k}": slope_change(curve, epoch + 1)}
        return found

    def due(self, found: dict, limit: float) -> list[int]:
        """The classes whose slope has changed by more than `limit`, of what `fit` found."""
        return [k for k in range(self.first, self.history.shape[1]) if found.get(f"slope_change_{k}", 0.0) > limit]

    def note(self, epoch: int, due: list[int], changed: Tensor) -> None:
        """Note a correction after an epoch (from 1): classes new to it, and which masks it changed, (images,) bool."""
        self.corrected[due] = epoch
        self.version.copy_(torch.where(changed, epoch, 0))
