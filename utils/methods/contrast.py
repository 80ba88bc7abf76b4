"""Pixel contrast of U2PL: a bank of negatives for every class, what is sampled from a batch, and InfoNCE.

Wang et al., CVPR 2022, section 3.3 and equation 7. C classes, P pixels of a batch in the order (image, row, column),
D numbers a feature. Nothing here waits for the device; how paper and released code differ: benchmarks/u2pl.md.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import InputError
from utils.images import IGNORE
from utils.methods.u2pl import Goal, rank_window, released_split, split_pixels
from utils.mixing import to_grid


class Sets(NamedTuple):
    """Which pixel serves which class, (C, P) bool each, and (C,) the class whose bank a class is contrasted with."""

    anchors: Tensor
    present: Tensor  # a class with such pixels takes part
    negatives: Tensor
    bank_of: Tensor
    centre: Tensor  # their mean is the positive


class MemoryBank(nn.Module):
    """For every class the newest `sizes[c]` features that are certainly not of it: ring buffers, saved with a run.

    Features have length 1 and are kept as `dtype`.
    """

    def __init__(self, sizes: list[int], dim: int, dtype: torch.dtype = torch.float16):
        super().__init__()
        size, self.even = torch.tensor(sizes), len(set(sizes)) == 1
        self.register_buffer("keys", torch.zeros(sum(sizes) + 1, dim, dtype=dtype))  # the last row takes what is spare
        self.register_buffer("size", size, persistent=False)
        self.register_buffer("start", size.cumsum(0) - size, persistent=False)
        self.register_buffer("ahead", torch.zeros_like(size))  # where the next feature goes
        self.register_buffer("filled", torch.zeros_like(size))

    @torch.no_grad()
    def push(self, keys: Tensor, count: Tensor) -> None:
        """Add features (C, K, D), of which the first count (C,) of a class are meant; the oldest make room."""
        k = torch.arange(keys.shape[1], device=keys.device)
        written = (k < count[:, None]) & (k >= (count - self.size)[:, None])
        rows = self.start[:, None] + (self.ahead[:, None] + k) % self.size[:, None]
        rows = rows.masked_fill(~written, len(self.keys) - 1).flatten()
        keys = unit(keys).masked_fill(~written[..., None], 0).flatten(0, 1)
        self.keys.index_copy_(0, rows, keys.to(self.keys.dtype))
        self.ahead.copy_((self.ahead + count) % self.size)
        self.filled.copy_(torch.minimum(self.filled + count, self.size))

    def sample(self, bank_of: Tensor, shape: tuple[int, int]) -> Tensor:
        """Rows of `keys`, (C, *shape) int64, drawn evenly and with replacement from the banks of these classes."""
        filled = self.filled[bank_of].view(-1, 1, 1)
        drawn = torch.rand((len(bank_of), *shape), device=filled.device) * filled
        return self.start[bank_of].view(-1, 1, 1) + torch.minimum(drawn.long(), (filled - 1).clamp(min=0))

    def cosines(self, anchor: Tensor, bank_of: Tensor, rows: Tensor) -> Tensor:
        """Similarity of anchors (C, M, D) of length 1 to the features in rows (C, M, N) of `sample`, as (C, M, N)."""
        size = (len(self.keys) - 1) // len(self.size)
        if self.even and size <= 16 * rows.shape[2]:  # then all similarities cost less than to collect the features
            keys = self.keys[:-1].view(len(self.size), size, -1)[bank_of].float()
            return torch.bmm(anchor, keys.mT).gather(2, rows - self.start[bank_of].view(-1, 1, 1))
        return torch.matmul(self.keys[rows].float(), anchor[..., None])[..., 0]

    def fill(self) -> Tensor:
        """How full the bank of every class is, (C,) in [0, 1]."""
        return self.filled / self.size


def unit(feature: Tensor) -> Tensor:
    """Features (..., D) scaled to length 1, in float32; 0 stays 0."""
    return F.normalize(feature.float(), dim=-1, eps=1e-8)


def contrast_sets(
    label: Tensor,
    prob: Tensor,
    reliable: Tensor,
    unreliable: Tensor,
    labelled: int,
    threshold: float,
    low: int,
    high: int,
) -> Sets:
    """What the paper has as anchors, positives and negatives.

    label (N, h, w) int64, 255 for none, the first `labelled` images annotated; prob (N, C, h, w) of the teacher;
    reliable and unreliable (N - labelled, h, w) bool. Anchors of a class are its reliable pixels of a probability above
    `threshold`, their centre is the positive. Negatives are annotated pixels of other classes that the teacher ranks
    among its `low` first, and unreliable pixels that rank the class from `low` to `high` (ranks count from 0).
    """
    of_class, ranked, valid = _one_hot(label, prob.shape[1]), _first(prob, low), label != IGNORE
    later = ~ranked if high >= prob.shape[1] else ~ranked & _first(prob, high)
    certain = of_class & _join(reliable, labelled)
    negatives = torch.cat([(ranked & ~of_class)[:labelled], later[labelled:] & unreliable[:, None]]) & valid[:, None]
    anchors = certain & (prob > threshold)
    anchors, certain, negatives = map(_by_class, (anchors, certain, negatives))
    return Sets(anchors, certain, negatives, torch.arange(len(anchors), device=prob.device), anchors)


def released_sets(
    of_class: Tensor,
    prob: Tensor,
    reliable: Tensor,
    unreliable: Tensor,
    labelled: int,
    threshold: float,
    low: int,
    high: int,
) -> Sets:
    """What the released code has: as `contrast_sets`, with the classes (N, C, h, w) of `released_one_hot`.

    Negatives of a class must also be of it; the k-th class that is present meets the anchors of class k.
    """
    ranked = _first(prob, low)
    later = ~ranked & _first(prob, min(high, prob.shape[1]))
    certain = of_class & _join(reliable, labelled)
    negatives = torch.cat([(ranked & ~of_class)[:labelled], later[labelled:] & unreliable[:, None]])
    anchors, negatives = certain & (prob > threshold), negatives & of_class & (prob < 1)
    anchors, certain, negatives = map(_by_class, (anchors, certain, negatives))
    return Sets(anchors, certain, negatives, (~certain.any(1)).int().argsort(stable=True), certain)


def released_one_hot(label: Tensor, classes: int) -> Tensor:
    """(N, classes, h, w) bool as the released encoder has it: the first image holds the labels of all images.

    It writes along the wrong axis: the other images are empty, and what they ignore counts as class 0 in the first.
    """
    union = _one_hot(label.masked_fill(label == IGNORE, 0), classes).any(0) & (label[0] != IGNORE)
    return torch.cat([union[None], torch.zeros_like(union).expand(len(label) - 1, *union.shape)])


def draw_anchors(candidates: Tensor, count: int) -> Tensor:
    """Pixels (C, count) int64 drawn evenly and with replacement from the candidates (C, P) of every class."""
    running = candidates.cumsum(1, dtype=torch.int32)
    drawn = torch.rand((len(candidates), count), device=candidates.device) * running[:, -1:]
    return _nth(running, torch.minimum(drawn.int(), running[:, -1:] - 1))


def draw_keys(candidates: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(pixels (C, K) int64, count (C,)): up to `most` different candidates (C, P) of every class, drawn evenly.

    The first count of a row are meant; all candidates, in order, where there are not more. K = min(most, P).
    """
    most = min(most, candidates.shape[1])
    running = candidates.cumsum(1, dtype=torch.int32)
    total = running[:, -1:].long()
    k = torch.arange(most, device=candidates.device)
    # one of each of `most` equal parts, which begin at a random place so that all have the same chance
    first, end = k * total // most, (k + 1) * total // most
    parts = first + (torch.rand(len(candidates), most, device=candidates.device) * (end - first)).long()
    turned = (parts + (torch.rand(len(candidates), 1, device=candidates.device) * total).long()) % total.clamp(min=1)
    place = torch.where(total > most, turned, k.expand_as(turned))
    return _nth(running, place.int()), total[:, 0].clamp(max=most)


def centres(feature: Tensor, members: Tensor) -> Tensor:
    """The mean of the features (P, D) of the members (C, P) of every class, (C, D); 0 for a class without any."""
    return members.float() @ feature.float() / members.sum(1).clamp(min=1)[:, None]


def info_nce(near: Tensor, far: Tensor, temperature: float) -> Tensor:
    """The loss of every class, (C,), from the similarity of its anchors to the positive (C, M) and to N negatives each.

    The mean over anchors of -log softmax of the positive among it and its negatives, far (C, M, N) (equation 7).
    """
    return -(torch.cat([near[..., None], far], 2) / temperature).log_softmax(2)[..., 0].mean(1)


def bank_of_flags(args, device) -> MemoryBank | None:
    """The empty banks of a run, None where --contrast-weight is 0; InputError for ranks that leave no negatives."""
    if args.contrast_weight == 0:
        return None
    classes = max(2, args.classes)
    low, high = rank_window(classes, args.rank_low, args.rank_high)
    if low >= high:
        what = "the ranks from the one up to the other leave no negatives"
        raise InputError(
            f"--rank-low {low} --rank-high {args.rank_high} with {classes} classes: {what}; lower --rank-low"
        )
    sizes = [args.bank_first or args.bank] + [args.bank] * (classes - 1)
    return MemoryBank(sizes, args.features).to(device)


def pixel_contrast(bank: MemoryBank, feature: Tensor, goal: Goal, args, every) -> tuple[Tensor, dict]:
    """(loss, numbers for the log) of a batch, after its negatives have joined the bank, in all processes alike.

    feature (N, D, h, w) is the student's of labelled and unlabelled images; only its anchors have a gradient. `every`
    gives a tensor of all processes.
    """
    sets = _sets_of(goal, feature.shape[2:], args)
    student, teacher = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (feature, goal.feature))
    keys, count = draw_keys(sets.negatives, args.max_keys)
    for new, number in zip(every(teacher[keys].to(bank.keys.dtype)), every(count), strict=True):
        bank.push(new, number)
    anchors = unit(student[draw_anchors(sets.anchors, args.anchors)])
    near = torch.einsum("cmd,cd->cm", anchors, unit(centres(teacher, sets.centre)))
    rows = bank.sample(sets.bank_of, (args.anchors, args.negatives))
    terms = info_nce(near, bank.cosines(anchors, sets.bank_of, rows), args.temperature)
    numbers = {"anchors": sets.anchors.sum()[None], "new_keys": count.sum()[None], "bank": bank.fill().mean()[None]}
    return mean_of_present(terms, sets, bank.filled), numbers


def _sets_of(goal, size, args):
    labelled, (low, high) = len(goal.mask), rank_window(goal.logits.shape[1], args.rank_low, args.rank_high)
    label = torch.cat([to_grid(goal.mask, size).long(), to_grid(goal.label, size)])
    how = (labelled, args.anchor_threshold, low, high)
    prob = goal.logits.softmax(1)
    if args.compat == "released":
        split = (to_grid(some, size) for some in released_split(goal.label, goal.entropy, goal.share))
        halves = label[:labelled], label[labelled:]
        return released_sets(torch.cat([released_one_hot(half, prob.shape[1]) for half in halves]), prob, *split, *how)
    split = split_pixels(goal.label, goal.entropy, goal.share, goal.threshold)
    return contrast_sets(label, prob, *(to_grid(some, size) for some in split), *how)


def mean_of_present(terms: Tensor, sets: Sets, filled: Tensor) -> Tensor:
    """The loss of a batch: the sum of the terms (C,) over the number of classes present; 0 for fewer than two.

    Terms count where a class has anchors and the bank that it meets is not empty; `filled` (C,) is that of the banks.
    """
    present = sets.present.any(1)
    number = present.sum()
    takes_part = sets.anchors.any(1) & (filled[sets.bank_of] > 0) & present[sets.bank_of]
    return (terms * takes_part).sum() / number.clamp(min=1) * (number > 1)


def _one_hot(label, classes):
    return label[:, None] == torch.arange(classes, device=label.device)[:, None, None]


def _first(prob, count):
    """Whether a class is among the `count` most probable, (N, C, h, w) bool."""
    best = prob.topk(count, 1).indices
    return torch.zeros_like(prob, dtype=torch.bool).scatter_(1, best, True)


def _join(reliable, labelled):
    return torch.cat([reliable.new_ones(labelled, *reliable.shape[1:]), reliable])[:, None]


def _by_class(members):
    return members.transpose(0, 1).flatten(1)


def _nth(running, n):
    """The place of the n-th member (from 0) in rows of running counts."""
    return torch.searchsorted(running, (n + 1).contiguous()).clamp(max=running.shape[1] - 1)
