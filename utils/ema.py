"""A teacher that is the exponential moving average of its student."""

import copy

import torch
from torch import Tensor, nn

from utils.checkpoint import bare


def average_decay(update: int, decay: float) -> float:
    """The share of itself that a teacher keeps in its update number 0, 1, 2, ...: 0, 1/2, 2/3, ... up to `decay`.

    Below 0 it is 0 too: the teacher is the student.
    """
    return min(1 - 1 / (max(update, 0) + 1), decay)


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy of the student that learns from no gradient, in evaluation mode."""
    return copy.deepcopy(bare(student)).requires_grad_(False).eval()


@torch.no_grad()
def follow(run, teacher: nn.Module, student: nn.Module, decay: float, buffers: bool = True) -> None:
    """Move the teacher towards the student, by 1 - `decay` of the way; 0 makes it the student.

    With `buffers` the running statistics of BatchNorm follow as the parameters do, and whole numbers are copied;
    without, they are left alone unless `decay` is 0.
    """
    if run.device.type == "cpu":  # on GPUs SyncBatchNorm did, or those of the first process are the ones that count
        run.share_buffers(student)
    student = bare(student)
    _move(list(teacher.parameters()), list(student.parameters()), 1 - decay)
    if not buffers and decay > 0:
        return
    pairs = list(zip(teacher.buffers(), student.buffers(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    _move([t for t, _ in floats], [s for _, s in floats], 1 - decay)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)


def _move(to: list[Tensor], towards: list[Tensor], share: float) -> None:
    if share == 1:  # a step of the whole way may round
        torch._foreach_copy_(to, towards)
    elif to:
        torch._foreach_lerp_(to, towards, share)


@torch.no_grad()
def take_buffers(teacher: nn.Module, student: nn.Module) -> None:
    """Give the teacher the student's buffers (BatchNorm statistics) as they are."""
    for to, value in zip(teacher.buffers(), bare(student).buffers(), strict=True):
        to.copy_(value)
