"""IEG and L2R for masks: the scores of pixels pooled to units, and what that makes every pixel count.

A unit is an image, a patch of it, or a pixel. Mirikharaji et al., "Learning to segment skin lesions from noisy
annotations", 2019, weigh pixels by L2R; patches, kept class shares and relabelling of units are this project's own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.images import IGNORE
from utils.losses import per_image_loss, per_pixel_loss
from utils.methods.ieg import (
    alignment,
    blend,
    consistency,
    effective_share,
    label_gain,
    mix_rows,
    mixup_shares,
    one_hot,
    soft_loss,
    weights_of,
)
from utils.methods.meta import derivative, momentum_of, parameters_of, probe_direction
from utils.methods.weighting import mean_of_pixels
from utils.mixing import rectangles
from utils.points import dense

RARE = 0.05  # below this share of the pixels a class is kept from losing them all


class Verdict(NamedTuple):
    """What the probe says of a batch of masks."""

    factor: Tensor  # (N, H, W), what a pixel counts; 1 everywhere is the plain loss
    keep: Tensor | None  # (N, H, W) bool, the labels that stay; None where all do: L2R, --no-relabel
    probe_loss: Tensor
    share: Tensor  # effective sample size of the units' weights, as a share of their number

    def of_images(self, mask: Tensor, classes: int) -> dict[str, Tensor]:
        """The mean over every image's pixels with a label of what was decided: {name: (N,)}."""
        maps = {"weight": self.factor} | ({} if self.keep is None else {"kept": self.keep.float()})
        return {name: mean_of_pixels(values, mask, classes) for name, values in maps.items()}


def known(mask: Tensor, classes: int) -> Tensor:
    """Pixels with a label, (N, H, W) bool; of binary masks all."""
    return torch.ones_like(mask, dtype=torch.bool) if classes == 1 else mask != IGNORE


def pool(score: Tensor, valid: Tensor, level: str, patch: int = 8) -> Tensor:
    """The mean score of the valid pixels of every unit: (N,), (N, H / patch, W / patch) or (N, H, W); 0 without any.

    Of an image it is the exact gradient of the mean loss of its pixels.
    """
    if level == "pixel":
        return score * valid
    sums = torch.stack([(score * valid).to(score.dtype), valid.to(score.dtype)])
    sums = sums.sum((2, 3)) if level == "image" else _cells(sums, patch)
    return sums[0] / sums[1].clamp(min=1)


def spread(weight: Tensor, valid: Tensor, level: str, patch: int = 8) -> Tensor:
    """Every unit's weight shared out evenly among its valid pixels, (N, H, W)."""
    if level == "pixel":
        return weight * valid
    count = valid.to(weight.dtype)
    count = count.sum((1, 2)) if level == "image" else _cells(count[None], patch)[0]
    return to_pixels(weight / count.clamp(min=1), valid, level, patch) * valid


def to_pixels(values: Tensor, valid: Tensor, level: str, patch: int = 8) -> Tensor:
    """The value of its unit at every pixel, (N, H, W)."""
    if level == "pixel":
        return values
    if level == "image":
        return values[:, None, None].expand(valid.shape)
    height, width = valid.shape[1:]
    return values.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]


def _cells(maps, patch):
    """Sums over patch x patch cells, (..., N, H, W) -> (..., N, h, w); cells at the edge may be smaller."""
    height, width = maps.shape[-2:]
    maps = F.pad(maps, (0, -width % patch, 0, -height % patch))
    return maps.unflatten(-1, (-1, patch)).sum(-1).unflatten(-2, (-1, patch)).sum(-2)


def keep_class_shares(weight: Tensor, mask: Tensor, valid: Tensor, how: str = "auto") -> Tensor:
    """Weights (N, H, W) scaled so that every class keeps its share of the batch's valid pixels; their sum is 1 then.

    Without it the probe's gradient for the frequent class may decide everything. "auto": where the rarest class that
    occurs holds less than a twentieth of the pixels; "on"; "off". A class whose weights are all 0 keeps none.
    """
    if how == "off":
        return weight
    label = mask.long().masked_fill(~valid, IGNORE).flatten()
    count = weight.new_zeros(IGNORE + 1).index_add(0, label, valid.flatten().to(weight.dtype))
    mass = torch.zeros_like(count).index_add(0, label, weight.flatten())
    share = count / count.sum().clamp(min=1)
    scaled = weight * (share / mass.clamp(min=1e-30))[label].view_as(weight)
    if how == "on":
        return scaled
    rarest = torch.where(count > 0, share, 1).min()
    return torch.where(rarest < RARE, scaled, weight)


def factors(weight: Tensor, valid: Tensor, floor: float) -> Tensor:
    """What every pixel's loss is multiplied with where an image's loss is its mean over pixels, (N, H, W).

    `weight` adds up to about 1 over the batch. A share `floor` of it is that of the plain loss: with 1 all are 1.
    """
    plain = valid.sum((1, 2), keepdim=True).clamp(min=1) * len(valid)
    return (1 - floor) * (weight * plain) + floor


def kept_labels(gain: Tensor, pseudo: Tensor, valid: Tensor, args) -> Tensor:
    """Pixels whose given label stays, (N, H, W) bool, decided by the mean gain of their unit.

    With --hysteresis d it also stays unless the gain exceeds d times the mean size of all gains, with --pseudo-floor
    where the pseudo label is less sure than that.
    """
    gain = pool(gain, valid, args.level, args.patch)
    keep = gain < 0
    if args.hysteresis:
        keep = gain <= args.hysteresis * gain.abs().mean()
    keep = to_pixels(keep, valid, args.level, args.patch)
    sure = pseudo.amax(1) if pseudo.shape[1] > 1 else torch.maximum(pseudo, 1 - pseudo)[:, 0]
    return keep | (sure < args.pseudo_floor)


def judge(net, optimizer, batch: dict, out, pseudo: Tensor | None, args) -> Verdict:
    """What the probe (`batch` probe, probe_mask) says of the masks of a batch, by the flags of train_ieg_seg.py.

    `out` are the logits of its images, with the graph that a look-ahead (--meta-step) of IEG follows. With `pseudo`
    labels (N, C, H, W) those given labels are not kept whose trust would raise the loss of the probe.
    """
    image, mask, probe = batch["image"], batch["mask"], batch["probe"].permute(0, 3, 1, 2)
    valid, label, trust = known(mask, args.classes), one_hot(mask, args.classes), args.grad_eps_init
    target, inner = label if pseudo is None else blend(label, pseudo, trust), None
    if args.meta_step and pseudo is not None:
        inner = mean_of_pixels(soft_loss(dense(out), target), mask, args.classes).mean()
    loss, direction = probe_direction(
        net,
        inner,
        momentum_of(net, optimizer),
        lambda forward: per_image_loss(forward(probe), batch["probe_mask"]).mean(),
        args.meta_step,
        args.meta_momentum,
        0.0,
        1024.0 if args.precision == "fp16" else 1.0,
    )
    own = parameters_of(net)
    (z,), (tangent,) = derivative(net, own, direction, lambda forward: (dense(forward(image)),), args.meta_grad)
    weight = weights_of(pool(alignment(z, target, tangent), valid, args.level, args.patch))
    every = keep_class_shares(spread(weight, valid, args.level, args.patch), mask, valid, args.class_shares)
    keep = None if pseudo is None else kept_labels(label_gain(z, label, pseudo, tangent), pseudo, valid, args)
    return Verdict(factors(every, valid, floor_of(args)), keep, loss, effective_share(weight))


def against_clean(verdict: Verdict, mask: Tensor, clean: Tensor, classes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For the log, where the clean masks (N, H, W) of a batch are known: {name: (part, whole)}, pixels with a label.

    `right_labels` as given, `kept_precision` of the labels that stay, `pixel_auroc`: the chance that a right label of
    the batch weighs more than a wrong one.
    """
    valid = known(mask, classes) & known(clean, classes)
    right = (mask == clean) & valid
    found = {"right_labels": (right, valid), "pixel_auroc": _auroc(verdict.factor, right, valid)}
    if verdict.keep is not None:
        found["kept_precision"] = (verdict.keep & right, verdict.keep & valid)
    return found


def _auroc(weight, right, valid, most=2**16):
    """(chance, 1), or (0, 0) where all labels are right or all wrong; of at most `most` pixels, evenly chosen."""
    step = -(-weight.numel() // most)
    weight, right, valid = (values.flatten()[::step] for values in (weight, right, valid))
    weight = weight.float().masked_fill(~valid, torch.inf)  # these rank last, where they count for nobody
    order = weight.sort().values
    ranks = (torch.searchsorted(order, weight) + torch.searchsorted(order, weight, right=True) + 1) / 2
    ones, zeros = right.sum().double(), (valid & ~right).sum().double()
    above = (ranks.double() * right).sum() - ones * (ones + 1) / 2
    some = (ones * zeros > 0).double()
    return some * above / (ones * zeros).clamp(min=1), some


def floor_of(args) -> float:
    """The share of the plain loss in the weighted one: --floor, or where it is left open 0.5 for L2R and 0 for IEG."""
    return args.floor if args.floor >= 0 else 0.5 * (args.method == "l2r")


def label_losses(out, mask: Tensor, pseudo: Tensor | None, verdict: Verdict, args) -> dict[str, Tensor]:
    """`omega`: the weighted loss of the given labels; of IEG also `lambda`, that of the labels as decided. Scalars.

    Both are means over images of their mean over pixels; with all factors 1, all labels kept and no pseudo labels
    each is the plain loss.
    """
    if pseudo is None:
        pixels = per_pixel_loss(out, mask)
        omega = mean_of_pixels(verdict.factor * pixels, mask, args.classes).mean()
        plain = mean_of_pixels(pixels, mask, args.classes).mean()
        return {"omega": omega} if args.method == "l2r" else {"omega": omega, "lambda": plain}
    logits, label = dense(out), one_hot(mask, args.classes)
    decided = torch.where(verdict.keep[:, None], label, pseudo)
    weighted = verdict.factor * soft_loss(logits, blend(label, pseudo, args.grad_eps_init))
    losses = {"omega": weighted, "lambda": soft_loss(logits, decided)}
    return {name: mean_of_pixels(loss, mask, args.classes).mean() for name, loss in losses.items()}


class Mixed(NamedTuple):
    """Rows of a mixed batch: N that begin with probe images, N with images, N with their strong views."""

    image: Tensor  # (3N, 3, H, W)
    keep: Tensor  # what a row keeps of itself: (3N, H, W) bool of CutMix, (3N,) of MixUp
    partner: Tensor  # (3N,) int64, the row that the rest comes from
    pick: Tensor  # (N,) int64, the probe image in each of the first rows

    def join(self, probe: Tensor, values: Tensor, strong: Tensor) -> Tensor:
        """The same mixture of other maps (N, C, H, W) of the probe, the images and the strong views."""
        return _mix(torch.cat([probe[self.pick], values, strong]), self.keep, self.partner)


def draw_mixture(batch: dict, kind: str) -> Mixed:
    """Mix the images of a batch, drawn by torch's generators: "cutmix" (rectangles of half the area) or "mixup"."""
    image, strong, probe = (batch["image"], *(batch[name].permute(0, 3, 1, 2) for name in ("strong", "probe")))
    count, device = 3 * len(image), image.device
    pick, partner = torch.randint(len(probe), (len(image),)), torch.randperm(count)
    pick, partner = (index.to(device, non_blocking=True) for index in (pick, partner))
    if kind == "cutmix":
        keep = ~rectangles(count, *image.shape[2:], device)
    else:
        keep = mixup_shares(torch.rand(count, device=device))
    return Mixed(_mix(torch.cat([probe[pick], image, strong]), keep, partner), keep, partner, pick)


def _mix(values, keep, partner):
    if keep.dtype == torch.bool:
        return torch.where(keep[:, None], values, values[partner])
    return mix_rows(values, keep, partner)


def mixed_losses(out, mixed: Mixed, batch: dict, pseudo: Tensor, classes: int) -> dict[str, Tensor]:
    """`probe`: the loss of the rows that begin with the probe, `mixed`: of the others; means over known pixels."""
    mask, truth = batch["mask"], batch["probe_mask"]
    target = mixed.join(one_hot(truth, classes), pseudo, pseudo)
    valid = [known(m, classes).float()[:, None] for m in (truth, mask)]
    loss, valid = soft_loss(dense(out), target), mixed.join(valid[0], valid[1], valid[1])[:, 0]
    parts = zip(("probe", "mixed"), *((maps[: len(mask)], maps[len(mask) :]) for maps in (loss, valid)), strict=True)
    return {name: (part * v).sum() / v.sum().clamp(min=1) for name, part, v in parts}


def agreement(weak, strong, mask: Tensor, classes: int) -> dict[str, Tensor]:
    """`kl`: the mean divergence of the strong view from the weak one over the pixels with a label."""
    valid = known(mask, classes)
    return {"kl": (consistency(dense(weak), dense(strong)) * valid).sum() / valid.sum().clamp(min=1)}
