"""Distances between the features of a student and of a teacher: how pixels relate to each other, to classes, to maps.

Channel counts may differ: what is compared are similarities. Sources: pairwise, Liu et al. (SKD), CVPR 2019, equation
(3); intra-class feature variation, Wang et al., ECCV 2020; attention transfer, Zagoruyko & Komodakis, ICLR 2017,
equation (2); mini-batch pixel-to-pixel, Yang et al. (CIRKD), CVPR 2022, equation (5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise(student: Tensor, teacher: Tensor, pool: int = 2) -> Tensor:
    """Mean squared difference of the cosines of all pairs of cells of an image, max-pooled first (SKD).

    Features (N, C, h, w) and (N, D, h, w); `pool` x `pool` cells become one, which bounds the (hw)^2 pairs.
    """
    both = []
    for maps in (student, teacher.detach()):
        maps = F.max_pool2d(maps.float(), pool, ceil_mode=True) if pool > 1 else maps.float()
        unit = F.normalize(maps.flatten(2), dim=1, eps=1e-8)
        both.append(unit.transpose(1, 2) @ unit)
    return F.mse_loss(*both)


def attention_transfer(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of the attention maps: mean of the squared channels, to unit length over space.

    Features (N, C, h, w) and (N, D, h, w); `valid` (N, h, w) bool: the other cells have no attention.
    """
    both = [maps.float().square().mean(1) for maps in (student, teacher.detach())]
    if valid is not None:
        both = [maps * valid for maps in both]
    return F.mse_loss(*(F.normalize(maps.flatten(1), dim=1) for maps in both))


def intra_class_variation(student: Tensor, teacher: Tensor, labels: Tensor, classes: int, released=False) -> Tensor:
    """Mean squared difference of cosine(feature, mean feature of its class in the image) (IFVD).

    Features (N, C, h, w) and (N, D, h, w), `labels` (N, h, w) uint8 below `classes`, others are void and left out. The
    gradient also flows through the means. `released`: void cells count, with a difference of 0, as in its code.
    """
    valid = labels < classes
    both = [_class_cosines(maps.float(), labels, classes) for maps in (student, teacher.detach())]
    square = (both[0] - both[1]).square() * valid
    return square.mean() if released else square.sum() / valid.sum().clamp(min=1)


def _class_cosines(maps, labels, classes):
    """The cosine of every cell's feature with the mean of its class, (N, h, w); any number for void cells."""
    codes = labels.long().clamp(max=classes)
    member = F.one_hot(codes, classes + 1).flatten(1, 2).to(maps.dtype)  # (N, hw, K + 1)
    means = maps.flatten(2) @ member / (member.sum(1, keepdim=True) + 1e-6)
    own = means.gather(2, codes.flatten(1)[:, None].expand(-1, maps.shape[1], -1))
    return F.cosine_similarity(maps, own.view_as(maps), dim=1)


def between_images(student: Tensor, teacher: Tensor, temperature: float = 0.1, pool: int = 2) -> Tensor:
    """Mean over all ordered pairs of images, also with itself, of the mean KL between rows of pixel similarities.

    A row is the softmax, over the cells of the second image, of the cosines with one cell of the first, divided by the
    temperature. Features (N, C, h, w) and (N, D, h, w), averaged over `pool` x `pool` cells first.
    """
    if pool > 1:
        student, teacher = (F.avg_pool2d(maps.float(), pool, ceil_mode=True) for maps in (student, teacher))
    s, t = (F.normalize(maps.float().flatten(2), dim=1).transpose(1, 2) for maps in (student, teacher.detach()))
    weight = torch.full(s.shape[:2], 1 / (len(s) ** 2 * s.shape[1]), device=s.device)
    return similarity_kl(s, s, t, t, weight, temperature)


def similarity_kl(student, student_keys, teacher, teacher_keys, weight, temperature: float, valid=None) -> Tensor:
    """Sum of weight x KL(teacher || student) of the softmax over the keys of every group, for every anchor and group.

    Anchors (B, A, C) and (B, A, D), keys (G, M, C) and (G, M, D), `weight` (B, A), `valid` (G, M) bool or None. The
    gradient, to `student` and `student_keys`, is made beside the value, one of the B blocks of anchors at a time: of
    the similarities, B A G M numbers, no more than a block is ever kept.
    """
    return _SimilarityKL.apply(student, student_keys, teacher, teacher_keys, weight, temperature, valid)


class _SimilarityKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, student_keys, teacher, teacher_keys, weight, temperature, valid):
        maps = [x.float().contiguous() for x in (student, student_keys, teacher, teacher_keys)]
        with torch.autocast(student.device.type, enabled=False):
            total, of_anchors, of_keys = _blocks(*maps, weight, temperature, valid, ctx.needs_input_grad[:2])
        ctx.save_for_backward(of_anchors, of_keys)
        return total

    @staticmethod
    def backward(ctx, outer):
        return *(None if g is None else outer * g for g in ctx.saved_tensors), None, None, None, None, None


def _blocks(student, student_keys, teacher, teacher_keys, weight, temperature, valid, wanted):
    total = weight.new_zeros(())
    of_anchors = torch.zeros_like(student) if wanted[0] else None
    of_keys = torch.zeros_like(student_keys) if wanted[1] else None
    groups, count = student_keys.shape[:2]
    keys_s, keys_t = student_keys.flatten(0, 1), teacher_keys.flatten(0, 1)
    for b in range(len(student)):
        log_s = _rows(student[b], keys_s, groups, temperature, valid)
        log_t = _rows(teacher[b], keys_t, groups, temperature, valid)
        t = log_t.exp()
        total = total + (weight[b][:, None] * torch.linalg.vecdot(t, log_t.sub_(log_s))).sum()
        if wanted[0] or wanted[1]:
            # of the KL with respect to the student's cosines
            slope = (log_s.exp_().sub_(t).mul_(weight[b][:, None, None] / temperature)).view(-1, groups * count)
        if wanted[0]:
            of_anchors[b] = slope @ keys_s
        if wanted[1]:
            of_keys.view(groups * count, -1).addmm_(slope.T, student[b])
    return total, of_anchors, of_keys


def _rows(anchors, keys, groups, temperature, valid):
    """Log softmax over the keys of each group, (A, G, M)."""
    logits = (anchors @ keys.T).div_(temperature).view(len(anchors), groups, -1)
    if valid is not None:
        logits.masked_fill_(~valid, -1e4)
    return logits.log_softmax(2)
