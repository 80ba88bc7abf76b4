"""Which examples two networks learn from: decoupling, co-teaching, co-teaching+.

An example is an image or a pixel; every function takes one flat vector of examples, so both units share the rules.
Sources: Malach & Shalev-Shwartz, NeurIPS 2017 (decoupling); Han et al., NeurIPS 2018 (co-teaching); Yu et al.,
ICML 2019 (co-teaching+). `nlkd` options follow the released NLKD code, which compares against adapted versions.
"""

from collections import deque

import torch
from torch import Tensor

from utils.images import IGNORE
from utils.lists import noisy_share
from utils.losses import hard, per_pixel_loss
from utils.metrics import sample_scores
from utils.points import PointLogits, dense


def forget_rate(
    epoch: int, epochs: int, rate: float, gradual: int = 10, exponent: float = 1.0, schedule: str = "linear"
) -> float:
    """Share of the examples dropped at `epoch` (from 0).

    "linear": rate * min(epoch^exponent / gradual, 1), equation (1) of the co-teaching paper. "linear_then_2tau": the
    same, then on to twice the rate in the last epoch (published variant of co-teaching+). "constant": rate.
    """
    if schedule == "constant":
        return rate
    if schedule == "linear" or epoch < gradual:
        return rate * min(epoch**exponent / gradual, 1.0) if gradual > 0 else rate
    return min(1.0, rate * (1 + (epoch - gradual) / max(1, epochs - 1 - gradual)))


def keep_count(n, rate: float, rule: str = "round"):
    """How many of n examples (int or 0-dim tensor) stay: max(1, round((1 - rate) n)), or n - floor(rate n) ("nlkd").

    Of no examples none stay.
    """
    n = torch.as_tensor(n)
    # float64 and a hair: 0.3 * 10 must not round down to 2 kept or floored to 2 dropped
    if rule == "nlkd":
        return n - torch.floor(rate * n.double() + 1e-9).long()
    return torch.round((1 - rate) * n.double() + 1e-9).long().clamp(min=1).minimum(n)


def keep_cleanest(score: Tensor, rate: float, rule: str = "round", among: Tensor | None = None, recent=None) -> Tensor:
    """Which examples have the highest scores: (n,) -> (n,) bool, a share `rate` is dropped.

    `among` (n,) bool restricts the choice, and the count, to a part of them. `recent` (m,) scores of earlier batches
    are ranked along, so that small batches do not quantise the rate. Of equal scores the later example stays, as
    in the released code.
    """
    among = torch.ones_like(score, dtype=torch.bool) if among is None else among
    pool = score.masked_fill(~among, -torch.inf)
    before = 0 if recent is None else len(recent)
    if before:
        pool = torch.cat([recent.to(pool.device), pool])
    rank = torch.empty_like(pool, dtype=torch.long)
    rank[pool.argsort(stable=True)] = torch.arange(len(pool), device=pool.device)
    count = keep_count(among.sum() + before, rate, rule).to(pool.device)
    return (rank >= len(pool) - count)[before:] & among


class Window:
    """The scores of the last `batches - 1` batches of each network; new in every epoch."""

    def __init__(self, batches: int):
        self.seen = [deque(maxlen=batches - 1) for _ in range(2)]

    def state_dict(self) -> dict:
        return {"seen": [[score.cpu() for score in seen] for seen in self.seen]}

    def load_state_dict(self, state: dict) -> None:
        for seen, saved in zip(self.seen, state["seen"], strict=True):
            seen.extend(saved)

    def recent(self, net: int) -> Tensor | None:
        return torch.cat(list(self.seen[net])) if self.seen[net] else None

    def add(self, *scores: Tensor, among: Tensor | None = None) -> None:
        """Remember the scores of a batch, of a part of it where the next batches are ranked against such a part."""
        for seen, score in zip(self.seen, scores, strict=True):
            if seen.maxlen:
                seen.append(score if among is None else score[among])


def fall_back(keep: Tensor, how: str) -> Tensor:
    """What to learn from when nothing was selected: nothing ("skip"), everything ("all"), image 0 ("first", nlkd)."""
    if how == "skip":
        return keep
    other = torch.ones_like(keep)
    if how == "first":
        other[1:] = False
    return torch.where(keep.any(), keep, other)


def disagreement(pred_a: Tensor, pred_b: Tensor, kind: str, below: float, classes=1, theta0=3, theta=5) -> Tensor:
    """Where two networks differ: (N, H, W) uint8 masks -> bool, (N,) for "iou"/"bf" under `below`, else every pixel.

    Pixels that are 255 in `pred_b`, of more than one class, count for no image.
    """
    if kind == "pixel":
        return pred_a != pred_b
    return sample_scores(pred_a, pred_b, classes, theta0, theta)[kind] < below


def differing_examples(logits_a: Tensor, logits_b: Tensor, mask: Tensor, args) -> Tensor:
    """`disagreement` of two networks' logits as a vector that goes with `examples`, by the flags of a script."""
    a, b, classes = hard(logits_a), hard(logits_b), logits_a.shape[1]
    if args.unit == "pixel":
        return flat(disagreement(a, b, "pixel", args.below), mask, classes)
    if classes > 1:
        b = b.masked_fill(mask == IGNORE, IGNORE)  # what nobody annotated is nothing to disagree about
    return disagreement(a, b, args.disagree, args.below, classes, args.theta0, args.theta)


def dropped_share(given: float, frame) -> float:
    """The forget rate of the flags, or where it is -1 the known noisy share of the list, else 0.2."""
    share = noisy_share(frame)
    return given if given >= 0 else min(0.9, share) if share is not None else 0.2


def plus(score: Tensor, differ: Tensor, rate: float, order: str = "nested", rule: str = "round", recent=None) -> Tensor:
    """Co-teaching+: the cleanest of those that disagree ("nested"), or of all, where they disagree ("intersect")."""
    if order == "nested":
        return keep_cleanest(score, rate, rule, among=differ, recent=recent)
    return keep_cleanest(score, rate, rule, recent=recent) & differ


def selected_loss(loss: Tensor, keep: Tensor, divide_by) -> Tensor:
    """Sum of the selected examples' losses, (n,) and (n,) bool, over `divide_by`."""
    return (loss * keep).sum() / divide_by


def selection_stats(keep: Tensor, noisy: Tensor) -> dict:
    """What to log of a selection: the share kept, and of images with known noise the purity, as (part, whole) pairs."""
    shown = {"kept": (keep.float(), torch.ones_like(keep, dtype=torch.float))}
    if len(keep) == len(noisy):
        clean, known = (keep & (noisy == 0)).float(), keep & (noisy >= 0)
        shown |= {"purity": (clean, known.float()), "recall": (clean, (noisy == 0).float())}
    return shown


def examples(logits: Tensor, mask: Tensor, unit: str, criterion) -> Tensor:
    """The loss of every example as one vector: (N,) for images; for pixels all that are annotated.

    `criterion` is what `utils.methods.robust_losses.build_loss` gives.
    """
    if unit == "image":
        return criterion(logits, mask)
    return flat(criterion.per_pixel(logits, mask), mask, logits.shape[1])


def flat(pixels: Tensor, mask: Tensor, classes: int) -> Tensor:
    """(N, H, W) values of pixels as one vector, without those the mask says to ignore."""
    return pixels.flatten() if classes == 1 else pixels[mask != IGNORE]


def cleanness(logits: Tensor, loss: Tensor, mask: Tensor, score: str, theta0: int = 3, theta: int = 5) -> Tensor:
    """How clean a network finds each example, higher is cleaner: minus its loss, or its score against the mask."""
    if score == "loss":
        if isinstance(logits, PointLogits) and len(loss) != len(mask):
            # the losses of pixels that are points were scaled up, which makes them no noisier; all losses of pixels
            # rank as cross entropy does
            loss = flat(per_pixel_loss(dense(logits), mask), mask, logits.shape[1])
        return -loss.detach()
    with torch.no_grad():
        return sample_scores(hard(logits), mask, logits.shape[1], theta0, theta)[score].float()
