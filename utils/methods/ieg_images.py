"""IEG and L2R for images with one label each: what a step decides about its labels, and the parts of its loss."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.methods.ieg import (
    alignment,
    blend,
    consistency,
    label_gain,
    mixed_losses,
    pseudo_label,
    soft_loss,
    weights_of,
)
from utils.methods.meta import Named, derivative, parameters_of, probe_direction


class Verdict(NamedTuple):
    """What the probe says of a batch of N labels."""

    weight: Tensor  # (N,), adds up to less than 1
    keep: Tensor  # (N,) bool; of L2R all
    probe_loss: Tensor


def judge(net: nn.Module, logits, views, label: Tensor, probe, momentum: Named, settings, scale=1.0) -> Verdict:
    """Weights and labels to keep of a batch; `settings` are the flags of train_ieg.py.

    `logits` are those of the `views`, (N, ...) each, weak and strong, as the network itself has just given them, with
    their graph (L2R: of the weak one); `label` (N, C) is one-hot, `probe` (images, one-hot labels).
    """
    s, relabel = settings, settings.method == "ieg"
    images, truth = probe
    pseudo, inner = None, None
    if relabel:
        follow = s.meta_pseudo_grad == "code"
        pseudo = pseudo_label(logits if follow else [z.detach() for z in logits], s.temperature, s.logit_norm)
        inner = soft_loss(logits[0], blend(label, pseudo, s.grad_eps_init)).mean()

    def probe_loss(forward):
        return soft_loss(forward(images), truth).mean()

    inertia = s.meta_momentum if relabel else 0.0
    loss, direction = probe_direction(net, inner, momentum, probe_loss, s.meta_step, inertia, s.weight_decay, scale)

    def answers(forward):
        weak = forward(views[0])
        if not (relabel and follow):
            return (weak,)
        return weak, pseudo_label([weak, forward(views[1])], s.temperature, s.logit_norm)

    (z, *_), (tangent, *moved) = derivative(net, parameters_of(net), direction, answers, s.meta_grad)
    if not relabel:
        weight = weights_of(alignment(z, label, tangent), s.meta_step or 1.0)
        return Verdict(weight, torch.ones_like(weight, dtype=torch.bool), loss)
    pseudo = pseudo.detach()
    target = blend(label, pseudo, s.grad_eps_init)
    score = alignment(z, target, tangent, *moved, share=1 - s.grad_eps_init)
    keep = label_gain(z, label, pseudo, tangent, *moved) < 0
    return Verdict(weights_of(score, s.meta_step or 1.0), keep, loss)


def label_losses(logits: Tensor, label: Tensor, pseudo: Tensor, verdict: Verdict, trust: float) -> dict[str, Tensor]:
    """`lambda`: the loss of the labels as they were decided; `omega`: that of the given ones, weighted. Scalars.

    Eq. 5 of IEG; the weights' labels are `trust` x given + (1 - trust) x pseudo label, as where they were judged.
    """
    decided = torch.where(verdict.keep[:, None], label, pseudo)
    weighted = verdict.weight * soft_loss(logits, blend(label, pseudo, trust))
    return {"lambda": soft_loss(logits, decided).mean(), "omega": weighted.sum()}


def total(parts: dict[str, Tensor], ce_factor: float, consistency_factor: float) -> Tensor:
    """The loss of a step, without weight decay, from `omega`, `lambda`, `probe`, `mixed` and `kl`, where they are.

    `omega` and `lambda` count one half each, as released; `omega` alone, of L2R, counts whole.
    """
    loss = (parts["omega"] + parts["lambda"]) / 2 if "lambda" in parts else parts["omega"]
    if "mixed" in parts:
        loss = loss + parts["probe"] + ce_factor * parts["mixed"]
    return loss + consistency_factor * parts["kl"] if "kl" in parts else loss


def mixed_parts(logits: Tensor, target: Tensor, count: int, norm: bool = True) -> dict[str, Tensor]:
    """`probe` and `mixed`: the mean losses of the mixed rows that begin with the probe, and of the others."""
    probe, mixed = mixed_losses(logits, target, count, norm)
    return {"probe": probe.mean(), "mixed": mixed.mean()}


def kl_part(weak: Tensor, strong: Tensor) -> dict[str, Tensor]:
    """`kl`: the mean divergence of the strong view from the weak one."""
    return {"kl": consistency(weak, strong).mean()}
