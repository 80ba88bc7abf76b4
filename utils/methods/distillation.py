"""Distances between the predictions of a student and of a teacher, as means over a batch.

The teacher's side gets no gradient. Sources: pixel-wise KL, Hinton et al., 2015, and Liu et al. (SKD), CVPR 2019;
channel-wise distillation, Shu et al., ICCV 2021; DIST, Huang et al., NeurIPS 2022. Where the released code of label
assisted distillation differs from them, `benchmarks/lad.md` says so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.images import IGNORE

FAR = torch.finfo(torch.float32).min / 2  # a logit whose probability is 0 beside any other


def to_grid(maps: Tensor, stride: int, keep: Tensor | None = None) -> Tensor:
    """(N, C, H, W) averaged over squares of `stride` pixels: (N, C, ceil(H / stride), ceil(W / stride)) float32.

    Of the pixels where `keep` (N, H, W) is True, if it is given; 0 for a cell without any.
    """
    maps = maps.float()
    if stride == 1:
        return maps
    if keep is None:
        return _cells(maps, stride)
    share = _cells(keep[:, None].float(), stride)
    return _cells(maps.masked_fill(~keep[:, None], 0.0), stride) / share.where(share > 0, 1.0)


def labels_on(mask: Tensor, stride: int) -> Tensor:
    """The label at the centre of every cell of `stride` pixels: (N, H, W) uint8 -> (N, ceil(H / stride), ...) uint8."""
    if stride == 1:
        return mask
    # the last cell may be cut off: its centre is that of what is left of it
    starts = [torch.arange(0, n, stride, device=mask.device) for n in mask.shape[1:]]
    rows, columns = (
        (first + (first + stride).clamp(max=n)) // 2 for first, n in zip(starts, mask.shape[1:], strict=True)
    )
    return mask[:, rows[:, None], columns]


def annotated(mask: Tensor, classes: int) -> Tensor | None:
    """Where a mask (N, H, W) says what there is, bool; None for binary masks, which say it everywhere."""
    return None if classes == 1 else mask != IGNORE


def pixel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, valid: Tensor | None = None, released=False):
    """T^2 KL(teacher || student) of the class probabilities at temperature T, mean over the valid pixels.

    Logits (N, C, h, w), one channel standing for a binary sigmoid; `valid` (N, h, w) bool or None for all pixels.
    `released`: without the factor T^2, and with 1e-5 added inside the logarithms, as in the released LAD code.
    """
    log_s, log_t = (_log_probabilities(z.float() / temperature) for z in (student, teacher.detach()))
    if released:
        each = log_t.exp() * ((log_t.exp() + 1e-5).log() - (log_s.exp() + 1e-5).log())
        return _mean(each.sum(1), valid)
    return temperature**2 * _mean((log_t.exp() * (log_t - log_s)).sum(1), valid)


def channel_wise(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, valid: Tensor | None = None, channels: int = 0
):
    """T^2 KL(teacher || student) of every channel's softmax over space, mean over images and channels (CWD).

    Maps (N, C, h, w), logits or features; `valid` (N, h, w) bool: the other pixels take no part. `channels`: divide by
    this number of channels, not by C; the released feature loss divides by those before its 1x1 convolution.
    """
    both = [maps.float() / temperature for maps in (student, teacher.detach())]
    if valid is not None:
        both = [maps.masked_fill(~valid[:, None], FAR) for maps in both]
    log_s, log_t = (maps.flatten(2).log_softmax(2) for maps in both)
    total = (log_t.exp() * (log_t - log_s)).sum()
    return temperature**2 * total / (len(student) * (channels or student.shape[1]))


def dist(student: Tensor, teacher: Tensor, beta: float = 1.0, gamma: float = 1.0, valid: Tensor | None = None):
    """beta (1 - mean correlation over a pixel's classes) + gamma (1 - mean correlation over a class's pixels) (DIST).

    Pearson correlations of the probabilities; logits (N, C, h, w), `valid` (N, h, w) bool. Two classes, as a binary
    mask has, always correlate by 1 or -1, which has no gradient: there only the second term counts.
    """
    s, t = (_log_probabilities(z.float()).exp().movedim(1, 3).flatten(0, 2) for z in (student, teacher.detach()))
    weight = s.new_ones(len(s), 1) if valid is None else valid.reshape(-1, 1).float()
    classes = s.new_ones(1, s.shape[1])
    loss = gamma * (1 - _correlation(s, t, weight, 0)).mean() * weight.any()
    if s.shape[1] == 2:
        return loss
    between = (1 - _correlation(s, t, classes, 1)) * weight[:, 0]
    return loss + beta * between.sum() / weight.sum().clamp(min=1)


def _cells(maps, stride):
    return F.avg_pool2d(maps, stride, ceil_mode=True, count_include_pad=False)


def _log_probabilities(logits):
    """Log probabilities of the classes, (N, C, h, w), C = 2 for one channel."""
    if logits.shape[1] == 1:
        return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], 1)
    return logits.log_softmax(1)


def _mean(values, valid):
    return values.mean() if valid is None else (values * valid).sum() / valid.sum().clamp(min=1)


def _correlation(a, b, weight, dim):
    """Pearson's correlation along `dim`, of the entries with weight 1."""
    count = weight.sum(dim, keepdim=True).clamp(min=1)
    a, b = (weight * (x - (weight * x).sum(dim, keepdim=True) / count) for x in (a, b))
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
