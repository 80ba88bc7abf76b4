"""U2PL arithmetic: which pseudo-labels are reliable, what they cost, and how that changes over the run.

Wang et al., "Semi-supervised semantic segmentation using unreliable pseudo-labels", CVPR 2022. Tensors in, tensors out;
nothing waits for the device. How paper and released code differ: benchmarks/u2pl.md.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.images import IGNORE
from utils.losses import ohem_loss, per_image_loss
from utils.mixing import cut, draw_mask, mix, to_grid


class Goal(NamedTuple):
    """What the teacher makes of a batch; N unlabelled images, on the grid of the features also the labelled ones."""

    image: Tensor  # (N, 3, H, W) uint8, for the student, mixed
    label: Tensor  # (N, H, W) int64, 255 for none
    entropy: Tensor  # (N, H, W), nats
    threshold: Tensor | None  # the entropy below which labels are reliable; None: all are
    truth: Tensor  # (N, H, W) uint8, 255 where nobody knows; for the log
    mask: Tensor  # of the labelled images
    share: float  # of unreliable pixels
    logits: Tensor | None = None  # (all, C, h, w), with contrast
    feature: Tensor | None = None  # (all, D, h, w), with contrast


class Split(NamedTuple):
    """Two sets of unlabelled pixels, (N, H, W) bool each; a pixel without pseudo-label is in neither."""

    reliable: Tensor
    unreliable: Tensor


def as_classes(logits: Tensor) -> Tensor:
    """Logits (N, C, H, W) in float32; a single channel becomes the two classes 0 and 1, of the same probabilities."""
    logits = logits.float()
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def pseudo_labels(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(label int64, confidence, entropy in nats), (N, H, W) each, of logits (N, C, H, W) with C of 2 or more."""
    log_prob = logits.float().log_softmax(1)
    confidence, label = log_prob.max(1)
    return label, confidence.exp(), -(log_prob.exp() * log_prob).sum(1)


def unreliable_share(epoch: int, epochs: int, start: float) -> float:
    """The share of pixels taken for unreliable in an epoch: from `start` to 0, linearly (paper, equation 5)."""
    return start * (1 - epoch / epochs)


def masked_quantile(values: Tensor, valid: Tensor, share: float) -> Tensor:
    """The quantile of the values where `valid`, a scalar; linear between neighbours as numpy.percentile has it.

    `share` in [0, 1]. Infinity where nothing is valid.
    """
    ordered = values.float().masked_fill(~valid, math.inf).flatten().sort().values
    place = share * (valid.sum() - 1).clamp(min=0).double()
    # to index by a number that lies on a GPU would wait for it
    low, high = ordered.take(torch.stack([place.floor(), place.ceil()]).long())
    part = (place - place.floor()).float()
    return torch.where(high > low, low + part * (high - low), low)


def split_pixels(label: Tensor, entropy: Tensor, share: float, threshold: Tensor) -> Split:
    """Pixels below and above the entropy `threshold`, the quantile 1 - `share` (equation 6); 255 is in neither.

    With `share` 0 nothing is unreliable.
    """
    valid = label != IGNORE
    if share <= 0:
        return Split(valid, torch.zeros_like(valid))
    return Split(valid & (entropy < threshold), valid & (entropy > threshold))


def released_split(label: Tensor, entropy: Tensor, share: float) -> Split:
    """As the released code: only the `share` of lowest entropy is reliable, that of highest is unreliable."""
    valid = label != IGNORE
    low, high = (masked_quantile(entropy, valid, at) for at in (share, 1 - share))
    return Split(valid & (entropy <= low), valid & (entropy >= high))


def reliable_loss(logits: Tensor, label: Tensor, entropy: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, kept): cross entropy with the pseudo-labels whose entropy is below `threshold` (None: with all).

    The mean over the kept pixels, divided by their share of all pixels (the paper's weight of the unsupervised loss,
    equation 4). logits (N, C, H, W) with C of 2 or more, label (N, H, W) int64 with 255 for none; kept (N, H, W) bool.
    0, with a gradient of 0, where nothing is kept.
    """
    kept = label != IGNORE
    if threshold is not None:
        kept = kept & (entropy < threshold)
    each = F.cross_entropy(logits.float(), label.masked_fill(~kept, IGNORE), ignore_index=IGNORE, reduction="none")
    # counts in float32 would be squared beyond its whole numbers
    mean, share = each.sum() / kept.sum().clamp(min=1), kept.float().mean()
    return mean / share.clamp(min=1 / kept.numel()), kept


def confident_loss(logits: Tensor, label: Tensor, confidence: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(loss, kept): cross entropy with pseudo-labels of at least this confidence, over the number of all of them.

    Sohn et al., "FixMatch", NeurIPS 2020, equation 4, and Yang et al., "UniMatch", CVPR 2023, for every pixel.
    Shapes as in `reliable_loss`.
    """
    known = label != IGNORE
    kept = known & (confidence >= threshold)
    each = F.cross_entropy(logits.float(), label.masked_fill(~kept, IGNORE), ignore_index=IGNORE, reduction="none")
    return each.sum() / known.sum().clamp(min=1), kept


def rank_window(classes: int, low: int, high: int) -> tuple[int, int]:
    """The ranks [low, high) at which a class is a negative of an unreliable pixel; high is at most `classes`.

    `low` 0 stands for the paper's 3, or for 1 below five classes, where the paper's window would leave next to nothing.
    """
    return low or (3 if classes >= 5 else 1), min(high, classes)


@torch.no_grad()
def teach(run, teacher, batch: dict, args, share: float) -> Goal:
    """Pseudo-labels and what is known of them, for a batch with `image`, `mask`, `weak` and `truth`.

    The teacher looks at every image once, as it is, in evaluation mode; what it says is mixed with the images. As the
    released code: it looks again at the mixed images, in training mode, and only the labels come from the first look.
    """
    image, weak, again = batch["image"], batch["weak"].permute(0, 3, 1, 2), args.compat == "released"
    contrast = args.contrast_weight > 0
    with run.autocast():
        seen = teacher(torch.cat([image, weak]) if contrast and not again else weak)
    logits = as_classes(seen.logits)
    label, _, entropy = pseudo_labels(logits[-len(weak) :])
    truth, keep = batch["truth"], None
    if args.mix != "none" and torch.rand(()) < args.mix_prob:
        keep = draw_mask(args.mix, label, logits.shape[1])
    if keep is not None and args.mix == "cutout":
        weak, label = cut(weak, label, keep)
    elif keep is not None:
        weak, label, truth, entropy = (mix(values, keep) for values in (weak, label, truth, entropy))
    if again:
        with run.autocast():
            seen = teacher.train()(torch.cat([image, weak]))
        teacher.eval()
        logits, keep = as_classes(seen.logits), None
        entropy = pseudo_labels(logits[len(image) :])[2]
    threshold = masked_quantile(entropy, label != IGNORE, 1 - share) if share > 0 else None
    goal = Goal(weak, label, entropy, threshold, truth, batch["mask"], share)
    if not contrast:
        return goal
    logits, feature = to_grid(logits, seen.feature.shape[2:]), seen.feature
    if keep is not None and args.mix != "cutout":
        logits, feature = (_mix_last(values, to_grid(keep, feature.shape[2:])) for values in (logits, feature))
    return goal._replace(logits=logits, feature=feature)


def supervised_loss(out, mask: Tensor, args) -> Tensor:
    """The loss of the labelled images, which come first: of hard pixels with --ohem; plus that of --aux-weight."""

    def of(logits):
        logits = logits[: len(mask)]
        hard = (args.ohem_threshold, args.ohem_kept)
        return ohem_loss(logits, mask, *hard) if args.ohem else per_image_loss(logits, mask).mean()

    return of(out.logits) + args.aux_weight * of(out.auxiliary) if args.aux_weight else of(out.logits)


def total(losses: dict[str, Tensor], args, out) -> Tensor:
    """The weighted sum of the losses of a step; a head that none of them uses takes part with a gradient of 0."""
    loss = losses["supervised"]
    if "unsupervised" in losses:
        loss = loss + args.unsup_weight * losses["unsupervised"]
    if "contrast" in losses:
        return loss + args.contrast_weight * losses["contrast"]
    return loss if out.feature is None else loss + 0 * out.feature.float().sum()


def pseudo_scores(goal, kept: Tensor) -> dict:
    """For the log: the share of pixels that were learnt from, and how many labels are right, of all and of those.

    `goal` has `label` (N, H, W) int64, `truth` (N, H, W) uint8, both with 255 for none, and `threshold`; kept is bool.
    """
    labelled = goal.label != IGNORE
    known, right = labelled & (goal.truth != IGNORE), goal.label == goal.truth
    found = {"reliable": (kept, labelled), "pseudo_accuracy": (right & known, known)}
    found["reliable_accuracy"] = (right & known & kept, known & kept)
    return found if goal.threshold is None else found | {"entropy_threshold": goal.threshold[None]}


def _mix_last(values, keep):
    """`mix` for the last images only, as many as `keep` has."""
    first = len(values) - len(keep)
    return torch.cat([values[:first], mix(values[first:], keep)])
