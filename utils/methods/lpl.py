"""Learning pseudo labels: losses over the classes that an image holds, and two networks that teach each other.

Wang et al., "Learning pseudo labels for semi-and-weakly supervised semantic segmentation", Pattern Recognition 132,
2022, and its released code; how both differ from this: benchmarks/lpl.md. Strong images have masks, weak ones the set
of their classes only. HybridNet learns from both; PseudoNet from what HybridNet makes of the weak images, so that its
IoU on the strong ones says how far its own labels can be trusted. Nothing waits for the device.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.images import IGNORE
from utils.losses import hard, per_pixel_loss
from utils.methods.u2pl import as_classes
from utils.methods.weighting import mean_of_pixels
from utils.metrics import split_iou
from utils.present import classes_in, restrict

EPS = 1e-5  # the released code adds it to the soft-max's sum, and to the probability
IN_USE = 0.1  # weak images that weigh at least this much are counted as in use


class Goal(NamedTuple):
    """What the networks are to learn from N weak images."""

    hybrid: Tensor  # (N, H, W) uint8, HybridNet's labels, for PseudoNet
    pseudo: Tensor  # (N, H, W) uint8, PseudoNet's, for HybridNet
    weight: Tensor  # (N,) in [0, 1], how much those count


def class_aware_pixels(logits: Tensor, mask: Tensor, present: Tensor) -> Tensor:
    """Cross entropy of every pixel, (N, H, W), of a soft-max over the classes that its image holds.

    logits (N, C, H, W), or (N, 1, H, W) for the classes 0 and 1; mask (N, H, W) uint8; present (N, C) or (N, 2) bool.
    0 where the mask is 255, and in images of one class; absent classes get no gradient. With all classes present it is
    `per_pixel_loss`. A mask with a class that is not present has an infinite loss.
    """
    if logits.shape[1] == 1:
        return per_pixel_loss(logits, mask) * (present.all(1) | ~present.any(1))[:, None, None]
    return per_pixel_loss(restrict(logits, present), mask)


def released_pixels(logits: Tensor, mask: Tensor, present: Tensor) -> Tensor:
    """`class_aware_pixels` as the released code has it, from exp(z) / (sum + 1e-5) + 1e-5, so at most 11.52.

    Without its overflow: it takes exp of the logits as they are, which is infinite from 88.8 on.
    """
    logits, void = as_classes(logits), mask == IGNORE
    total = torch.logaddexp(restrict(logits, present).logsumexp(1), logits.new_full((), math.log(EPS)))
    own = logits.gather(1, mask.masked_fill(void, 0).long()[:, None])[:, 0]
    # void pixels are left out before exp, whose infinity would spoil a gradient of 0
    return -((own - total).masked_fill(void, 0.0).exp() + EPS).log().masked_fill(void, 0.0)


def segmentation_loss(logits: Tensor, mask: Tensor, present: Tensor, args) -> Tensor:
    """The class-aware cross entropy of a batch, a scalar: the mean over its images of the mean over their pixels.

    With --no-class-aware over all classes; as the released code the mean over all annotated pixels.
    """
    seen = present if args.class_aware else torch.ones_like(present)
    if args.compat == "released":
        known = mask != IGNORE
        return released_pixels(logits, mask, seen).sum() / known.sum().clamp(min=1)
    return _of_images(logits, mask, seen).mean()


def image_level_loss(logits: Tensor, held: Tensor) -> Tensor:
    """Binary cross entropy of an image's largest logit of each class above 0, with whether it holds it; a scalar.

    logits (N, C, H, W) or (N, 1, H, W), held (N, C) or (N, 2) bool. The only loss that speaks of absent classes.
    """
    highest = logits.flatten(2).amax(2).float()
    highest = highest if logits.shape[1] == 1 else highest[:, 1:]
    return F.binary_cross_entropy_with_logits(highest, held[:, 1:].float())


def cross_losses(logits: list[Tensor], goal: Goal, present: Tensor, args) -> dict[str, Tensor]:
    """What the networks learn from each other on N weak images: `pseudo` for PseudoNet, `cross` for HybridNet.

    `logits` are those of HybridNet and of PseudoNet, (N, C, H, W) each. `cross` is the mean over the images of their
    class-aware cross entropy with PseudoNet's labels, times their weight.
    """
    hybrid, pseudo = logits
    losses = {"pseudo": segmentation_loss(pseudo, goal.hybrid, present, args)}
    seen = present if args.class_aware else torch.ones_like(present)
    if args.compat == "released":
        each = released_pixels(hybrid, goal.pseudo, seen).mean((1, 2))
    else:
        each = _of_images(hybrid, goal.pseudo, seen)
    return losses | {"cross": (goal.weight * each).mean()}


class DynamicEvaluation(nn.Module):
    """IoU of every class on what a network sees in training, and how much its labels of an image count for that.

    Keeps sums of pixel counts, each batch counting `momentum` times as much as the one after it. `released`: counts
    predictions also where the mask is 255, and passes over classes whose IoU is 0 when images are weighted.
    """

    def __init__(self, classes: int, momentum: float = 0.99, power: float = 8.0, released: bool = False):
        super().__init__()
        self.momentum, self.power, self.released = momentum, power, released
        counts = torch.zeros(3, max(2, classes), dtype=torch.float64)
        counts[2] = 1
        self.register_buffer("counts", counts)  # pixels in both, predicted, annotated

    @torch.no_grad()
    def update(self, pred: Tensor, mask: Tensor, total=lambda counts: counts) -> None:
        """Count a batch of masks, (N, H, W) uint8 each; `total` sums counts over processes."""
        found = areas(pred, mask, self.counts.shape[1])
        if self.released:
            found[1] = areas(pred, pred, self.counts.shape[1])[1]
        self.counts.mul_(self.momentum).add_(total(found))

    def iou(self) -> Tensor:
        """The IoU of every class, (C,); 0 of a class that was never found, annotated or not."""
        both, pred, mask = self.counts
        return both / (pred + mask - both).clamp(min=1e-30)

    def image_weight(self, present: Tensor) -> Tensor:
        """(N, C) bool -> (N,) float32 in [0, 1]: (smallest IoU of the classes that an image holds) ^ power.

        A class that was never found makes it 0; `released`: it is left out, and an image of such classes only has 1.
        """
        iou = self.iou()
        counted = present & (iou > 0) if self.released else present
        return torch.where(counted, iou, torch.inf).amin(1).clamp(max=1).pow(self.power).float()


class Tally:
    """How good the labels of weak images were in an epoch, for the log; counts only where their masks are known."""

    def __init__(self, classes: int, device: torch.device):
        self.areas = torch.zeros(2, 3, max(2, classes), dtype=torch.float64, device=device)

    def state_dict(self) -> dict:
        return {"areas": self.areas.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self.areas.copy_(state["areas"])

    @torch.no_grad()
    def add(self, goal: Goal, truth: Tensor) -> None:
        """Compare labels with masks (N, H, W) uint8, 255 where nobody knows."""
        self.areas += torch.stack([areas(label, truth, self.areas.shape[2]) for label in (goal.hybrid, goal.pseudo)])


def areas(pred: Tensor, mask: Tensor, classes: int) -> Tensor:
    """(3, classes) float64: pixels of every class in both masks, predicted and annotated, where `mask` is not 255."""
    void = mask == IGNORE
    both = torch.where(pred == mask, mask, classes)
    # a counter for each row of pixels: on a GPU a few counters for all would make additions wait for each other
    rows = torch.stack([both, pred, mask]).masked_fill(void, classes).flatten(1, 2).long()
    found = torch.zeros(*rows.shape[:2], classes + 1, dtype=torch.int64, device=mask.device)
    one = torch.ones((), dtype=torch.int64, device=mask.device)
    return found.scatter_add_(2, rows, one.expand_as(rows)).sum(1)[:, :classes].double()


@torch.no_grad()
def cross_labels(run, logits: list[Tensor], batch: dict, evaluation: DynamicEvaluation) -> Goal:
    """The labels that both networks give to the weak images, and their weights after counting this batch.

    `logits` of both networks for `image` and `weak` of the batch, one after the other. Labels are of classes present.
    """
    count, present = len(batch["image"]), batch["weak_present"]
    probe = hard(restrict(logits[1][:count], batch["present"]))
    evaluation.update(probe, batch["mask"], run.sum)
    hybrid, pseudo = (hard(restrict(each[count:], present)) for each in logits)
    return Goal(hybrid, pseudo, evaluation.image_weight(present))


def hybrid_losses(logits: Tensor, batch: dict, args) -> dict[str, Tensor]:
    """What HybridNet learns from masks (`hybrid`) and from image-level classes (`image`, unless its weight is 0).

    A crop of a strong image holds the classes of its mask; as the released code those of the whole image.
    """
    mask = batch["mask"]
    present = batch["present"] if "present" in batch else classes_in(mask, args.classes)  # a run without weak images
    losses = {"hybrid": segmentation_loss(logits[: len(mask)], mask, present, args)}
    if args.cls_weight > 0:
        held = present if args.compat == "released" else classes_in(mask, args.classes)
        losses["image"] = image_level_loss(logits, torch.cat([held, batch["weak_present"]]))
    return losses


def total(losses: dict[str, Tensor], args) -> Tensor:
    """The weighted sum of HybridNet's losses, a scalar."""
    loss = losses["hybrid"]
    if "image" in losses:
        loss = loss + args.cls_weight * losses["image"]
    return loss + args.pct_weight * losses["cross"] if "cross" in losses else loss


def weight_scores(weight: Tensor) -> dict:
    """For the log: the weight of weak images, and the share of those in use, that weigh IN_USE or more."""
    return {"image_weight": weight, "in_use": (weight >= IN_USE).float()}


def cross_scores(evaluation: DynamicEvaluation, of_labels: Tensor) -> dict:
    """For the log: PseudoNet's IoU of every class on strong images, and the mIoU of both networks' labels of weak ones.

    `of_labels` are the areas of a `Tally`; where no mask of a weak image is known there is no mIoU.
    """
    found = {"class_iou": [round(iou, 6) for iou in evaluation.iou().tolist()]}
    if of_labels[:, 2].any():
        names = ("pseudo_miou_hybrid", "pseudo_miou_pseudo")
        found |= {name: split_iou(*of_net)["miou"] for name, of_net in zip(names, of_labels, strict=True)}
    return found


def _of_images(logits, mask, present):
    return mean_of_pixels(class_aware_pixels(logits, mask, present), mask, logits.shape[1])
