"""Early-learning correction (ADELE): when a class begins to memorise its labels, and what they are corrected to.

Source: Liu et al., "Adaptive early-learning correction for segmentation from noisy annotations", CVPR 2022, and where
it leaves details open the authors' code. Classes are 1 to C - 1 (binary: 1); class 0 is the background.
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
    """(a, b, c) of the least-squares `learning_curve` of the IoU of every epoch, 0 < a <= 1 and b, c >= 0.

    Negative for epochs without the class. None for fewer than four epochs, for a class that was never hit, or where no
    curve is found.
    """
    known = ious >= 0
    if known.sum() < FEWEST or ious.max() <= 0:
        return None
    epochs, ious = np.arange(1.0, len(ious) + 1)[known], ious[known]
    start = (float(np.clip(ious.max(), 1e-3, 1)), 1.0, 1.0)
    bounds = ([0, 0, 0], [1, np.inf, np.inf])
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # says that the fit is exact
        try:
            found, _ = curve_fit(learning_curve, epochs, ious, start, bounds=bounds, max_nfev=10_000)
        except (RuntimeError, ValueError):  # no minimum; a value that is not finite on the way
            return None
    return tuple(found.tolist())


def slope_change(curve: tuple[float, float, float], epoch: int) -> float:
    """How far the slope of a `learning_curve` has fallen since epoch 1, |f'(1) - f'(t)| / |f'(1)|.

    In [0, 1]; 0 for a slope that has risen, and for a curve without slope.
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


def scale_divergence(every: list[Tensor], confidence: float = 0.8) -> Tensor:
    """The mean KL(p_k || q) over scales k and pixels, q the mean of the p_k, (N,) float32.

    `every` has the logits of each scale, (N, 1, H, W) or (N, C, H, W). 0 for an image on which q is nowhere as sure as
    `confidence`, as in the authors' code.
    """
    logs = torch.stack([log_probabilities(logits) for logits in every])
    mean = logs.logsumexp(0) - math.log(len(every))
    divergence = (logs.exp() * (logs - mean)).sum(2).mean((0, 2, 3))
    return divergence * (mean.exp().amax((1, 2, 3)) >= confidence)


def log_probabilities(logits: Tensor) -> Tensor:
    """Of all classes, (N, C, H, W) float32; two for logits of one channel."""
    logits = dense(logits).float()
    both = torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], 1) if logits.shape[1] == 1 else None
    return logits.log_softmax(1) if both is None else both


def class_overlaps(logits: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """{"iou_k": (intersection, union)} in pixels of the hard masks with a batch's masks, for every class k above 0."""
    pred, classes = hard(logits), max(2, logits.shape[1])
    pairs = mask.long() * classes + pred
    if logits.shape[1] > 1:
        pairs = pairs.masked_fill(mask == IGNORE, classes**2)
    ones = torch.ones((), dtype=torch.int64, device=pairs.device).expand(pairs.numel())
    counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=pairs.device).scatter_add_(0, pairs.flatten(), ones)
    counts = counts[:-1].view(classes, classes)
    inter = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - inter
    return {f"iou_{k}": (inter[k], union[k]) for k in range(1, classes)}


def correct_masks(mask: Tensor, probability: Tensor, due: list[int], done: list[int], threshold: float) -> Tensor:
    """Masks (N, H, W) uint8 with the labels of the classes `due` corrected by probabilities (N, C, H, W).

    A pixel becomes its most probable class where that is more probable than `threshold`, where label and prediction are
    the background, due or `done` (corrected before), one of them due, and where the image's mask has that class
    somewhere: a correction moves classes, and invents none. 255 stays.
    """
    sure, pred = probability.max(1)
    may, now = (torch.zeros(IGNORE + 1, dtype=torch.bool, device=mask.device) for _ in range(2))
    may[[0, *due, *done]], now[due] = True, True
    there = torch.zeros(len(mask), IGNORE + 1, dtype=torch.bool, device=mask.device)
    there = there.scatter_(1, mask.flatten(1).long(), True)
    there[:, 0] = True
    label = mask.long()
    change = (sure > threshold) & may[label] & may[pred] & (now[label] | now[pred])
    change &= there.gather(1, pred.flatten(1)).view_as(pred)
    return torch.where(change, pred.byte(), mask)


class EarlyLearning(nn.Module):
    """What a run has learnt about its classes and labels, all of it in buffers that its checkpoints save.

    `history` (epochs, classes): training IoU, -1 where unknown; `corrected` (classes,): the epoch, from 1, after which
    a class was corrected, 0: not yet; `version` (images,): the epoch of the corrected mask that an image has, 0: the
    given one. `version` is in shared memory, so that loader processes see it.
    """

    def __init__(self, epochs: int, classes: int, images: int):
        super().__init__()
        self.register_buffer("history", torch.full((epochs, max(2, classes)), -1.0, dtype=torch.float64))
        self.register_buffer("corrected", torch.zeros(max(2, classes), dtype=torch.int32))
        self.register_buffer("version", torch.zeros(images, dtype=torch.int32).share_memory_())

    def done(self) -> list[int]:
        """The classes that have been corrected."""
        return self.corrected.nonzero().flatten().tolist()

    def fit(self, epoch: int, means: dict[str, float]) -> dict:
        """Note the IoUs of an epoch (from 0), {"train_iou_k": IoU}, and fit the curve of every class left to correct.

        Returns what to log: `curve_k`, [a, b, c], and `slope_change_k`.
        """
        found = {}
        for k in range(1, self.history.shape[1]):
            self.history[epoch, k] = means.get(f"train_iou_{k}", -1.0)
            curve = None if self.corrected[k] else fit_curve(self.history[: epoch + 1, k].numpy())
            if curve:
                found |= {f"curve_{k}": list(curve), f"slope_change_{k}": slope_change(curve, epoch + 1)}
        return found

    def due(self, found: dict, limit: float) -> list[int]:
        """The classes whose slope has changed by more than `limit`, of what `fit` found."""
        return [k for k in range(1, self.history.shape[1]) if found.get(f"slope_change_{k}", 0.0) > limit]

    def note(self, epoch: int, due: list[int], changed: Tensor) -> None:
        """Note a correction after an epoch (from 1): its classes, and which images it changed, (images,) bool."""
        self.corrected[due] = epoch
        self.version[changed] = epoch
