"""IEG: which labels of a batch to keep, how much each counts, and what its pseudo labels teach besides.

Zhang et al., "Distilling effective supervision from severe label noise", CVPR 2020 (IEG), on top of Ren et al.,
"Learning to reweight examples for robust deep learning", ICML 2018 (L2R). Logits, labels and targets are (N, C) or maps
(N, C, H, W), with one channel for two classes (a sigmoid), else a softmax over the channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.images import IGNORE

SMALL = 1e-5  # added to the sum of the weights, as in the released code


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Labels (N, ...) -> targets (N, C, ...) float32; one class: (N, 1, ...). What is marked 255 has no class."""
    if classes == 1:
        return (label == 1).float()[:, None]
    known = label != IGNORE
    target = F.one_hot(torch.where(known, label, 0).long(), classes).movedim(-1, 1).float()
    return target * known[:, None]


def soft_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with soft targets of the same shape, without their channels: (N, ...)."""
    logits = wide(logits)
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")[:, 0]
    return -(target * logits.log_softmax(1)).sum(1)


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the channels, or the sigmoid of the only one."""
    return wide(logits).sigmoid() if logits.shape[1] == 1 else wide(logits).softmax(1)


def normalised(logits: Tensor) -> Tensor:
    """Logits divided by their root mean square over the whole batch; in the released code, not in the paper."""
    logits = wide(logits)
    return logits / (logits.square().mean() + 1e-8).sqrt()


def pseudo_label(views: list[Tensor], temperature: float = 0.5, norm: bool = True) -> Tensor:
    """The sharpened mean prediction of several views of the same images, shaped as their logits; eq. 3 of IEG.

    A `temperature` of 1 is the mean itself. With `norm` each view's logits are `normalised` first.
    """
    mean = sum(probabilities(normalised(view) if norm else view) for view in views) / len(views)
    if mean.shape[1] == 1:
        here, other = mean ** (1 / temperature), (1 - mean) ** (1 / temperature)
        return here / (here + other)
    sharp = mean ** (1 / temperature)
    return sharp / sharp.sum(1, keepdim=True)


def alignment(logits: Tensor, target: Tensor, tangent: Tensor, pseudo_tangent: Tensor | None = None, share: float = 0):
    """The product of every example's gradient with G, (N, ...): how much it helps the probe to learn the example.

    <p - t, z'>, where z' is the derivative of the logits along G. Where the target holds a `share` of a pseudo label
    that moves along, its derivative enters too.
    """
    score = ((probabilities(logits) - target) * wide(tangent)).sum(1)
    return score if pseudo_tangent is None else score - share * (pseudo_tangent * wide(logits)).sum(1)


def label_gain(logits, label: Tensor, pseudo: Tensor, tangent: Tensor, pseudo_tangent: Tensor | None = None) -> Tensor:
    """The derivative of the probe's loss by the trust in a given label, up to a positive factor, (N, ...).

    Below 0 the label is kept, else the pseudo label takes its place: eq. 6 of IEG.
    """
    gain = ((label - pseudo) * wide(tangent)).sum(1)
    return gain if pseudo_tangent is None else gain - (pseudo_tangent * wide(logits)).sum(1)


def weights_of(score: Tensor, step: float = 1.0) -> Tensor:
    """`step` x score, clipped at 0 and divided by its sum (+ 1e-5): weights that add up to less than 1.

    No example that helps: all are 0. So is a score that is not finite, as float16 may give one.
    """
    raw = (step * score).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    return raw / (raw.sum() + SMALL)


def original_weights(score: Tensor) -> Tensor:
    """The weights of L2R's own code: they add up to 1, unless all are 0."""
    raw = score.clamp(min=0)
    total = raw.sum()
    return raw / (total + (total == 0))


def blend(label: Tensor, pseudo: Tensor, trust) -> Tensor:
    """trust x label + (1 - trust) x pseudo label; `trust` a number, or (N, 1, ...)."""
    return trust * label + (1 - trust) * pseudo


def mixup_shares(draw: Tensor, true_beta: bool = False) -> Tensor:
    """The share a row keeps of itself, in [1/2, 1], from uniform draws: 1 - u^2 / 2, as released for Beta(1/2, 1/2).

    `true_beta`: max(b, 1 - b) of that distribution itself, by its inverse, sin(pi u / 2)^2.
    """
    if true_beta:
        beta = torch.sin(torch.pi * draw / 2) ** 2
        return torch.maximum(beta, 1 - beta)
    return 1 - draw.square() / 2


def mix_rows(values: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """share x row + (1 - share) x its partner; values (R, ...), share (R,), partner (R,) int64."""
    share = share.view(-1, *[1] * (values.dim() - 1)).to(torch.promote_types(values.dtype, torch.float32))
    return share * values + (1 - share) * values[partner]


def mixed_losses(logits: Tensor, target: Tensor, count: int, norm: bool = True) -> tuple[Tensor, Tensor]:
    """(loss of the `count` probe rows, loss of the others) of mixed rows, (R, ...) -> the rows' losses.

    With `norm` each block of `count` rows has its logits `normalised`, gradient and all.
    """
    blocks = logits.split(count)
    loss = soft_loss(torch.cat([normalised(block) for block in blocks]) if norm else logits, target)
    return loss[:count], loss[count:]


def consistency(weak: Tensor, strong: Tensor) -> Tensor:
    """KL(weak || strong), (N, ...) >= 0; the weak view is a constant."""
    weak, strong = wide(weak).detach(), wide(strong)
    if weak.shape[1] == 1:
        weak, strong = torch.cat([weak, 0 * weak], 1), torch.cat([strong, 0 * strong], 1)
    log_p, log_q = weak.log_softmax(1), strong.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def effective_share(weight: Tensor) -> Tensor:
    """The effective sample size (sum w)^2 / sum w^2 as a share of the examples, a scalar in [0, 1]; 0 if all are 0."""
    weight = weight.flatten()
    return weight.sum().square() / weight.square().sum().clamp(min=1e-30) / len(weight)


def average_decay(update: int, decay: float = 0.999) -> float:
    """The share of itself that IEG's average of the weights keeps in its update number 1, 2, ...: 2/11, 3/12, ..."""
    return min(decay, (1 + update) / (10 + update))


def restart_factor(step: int, first: int, t_mul: float = 1.5, m_mul: float = 0.9) -> float:
    """The learning rate at a step (from 0) of cosine decay with warm restarts, as a share of the first one.

    The first period has `first` steps; each next one is `t_mul` times as long and begins `m_mul` times as high.
    Loshchilov and Hutter, "SGDR", ICLR 2017, as in TensorFlow.
    """
    cycle, start, length = 0, 0.0, float(first)
    while step >= start + length:
        cycle, start, length = cycle + 1, start + length, length * t_mul
    return m_mul**cycle * 0.5 * (1 + math.cos(math.pi * (step - start) / length))


def cycle_ends(first: int, steps: int, t_mul: float = 1.5, rounded: bool = False) -> list[int]:
    """The steps (counted from 1) after which a period of `restart_factor` is over, up to `steps`.

    `rounded`: every length is rounded before the next is made of it, as the released code does where it decides when to
    test, but not for the learning rate.
    """
    ends, end, length = [], 0.0, float(first)
    while (end := end + length) <= steps:
        ends.append(math.ceil(end - 0.5))
        length = float(round(length * t_mul)) if rounded else length * t_mul
    return ends
