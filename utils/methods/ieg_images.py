"""IEG and L2R for images with one label each: what a step decides about its labels, and the parts of its loss."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.methods.ieg import (
    alignment,
    blend,
    consistency,
    effective_share,
    label_gain,
    mix_rows,
    mixed_losses,
    mixup_shares,
    pseudo_label,
    soft_loss,
    weights_of,
)
from utils.methods.meta import Named, derivative, parameters_of, probe_direction, step_along


class Verdict(NamedTuple):
    """What the probe says of a batch of N labels."""

    weight: Tensor  # (N,), adds up to less than 1
    keep: Tensor | None  # (N,) bool; None where all stay: L2R, --no-relabel
    probe_loss: Tensor

    def of_labels(self) -> dict[str, Tensor]:
        """What was decided of every label, for the log: {name: (N,)}."""
        return {"weight": self.weight} | ({} if self.keep is None else {"kept": self.keep.float()})


def judge(net: nn.Module, logits, views, label: Tensor, probe, momentum: Named, settings, scale=1.0) -> Verdict:
    """Weights and labels to keep of a batch; `settings` are the flags of train_ieg.py.

    `logits` are those of the `views`, (N, ...) each, weak and strong, as the network itself has just given them, with
    their graph (L2R: of the weak one); `label` (N, C) is one-hot, `probe` (images, one-hot labels). With --no-relabel
    the loss that is judged is that of the given labels alone, as it is the one that is learnt.
    """
    s, relabel = settings, settings.method == "ieg" and settings.relabel
    pseudo, inner = None, None
    if s.method == "ieg" and not relabel:
        inner = soft_loss(logits[0], label).mean()
    if relabel:
        follow = s.meta_pseudo_grad == "code"
        pseudo = pseudo_label(logits if follow else [z.detach() for z in logits], s.temperature, s.logit_norm)
        inner = soft_loss(logits[0], blend(label, pseudo, s.grad_eps_init)).mean()

    loss, direction = _ask(net, inner, probe, momentum, s, scale)

    def answers(forward):
        weak = forward(views[0])
        if not (relabel and follow):
            return (weak,)
        return weak, pseudo_label([weak, forward(views[1])], s.temperature, s.logit_norm)

    (z, *_), (tangent, *moved) = derivative(net, parameters_of(net), direction, answers, s.meta_grad)
    if not relabel:
        return Verdict(weights_of(alignment(z, label, tangent), s.meta_step or 1.0), None, loss)
    pseudo = pseudo.detach()
    target = blend(label, pseudo, s.grad_eps_init)
    score = alignment(z, target, tangent, *moved, share=1 - s.grad_eps_init)
    keep = label_gain(z, label, pseudo, tangent, *moved) < 0
    return Verdict(weights_of(score, s.meta_step or 1.0), keep, loss)


def judge_in_step(net, own: nn.Module, image, label: Tensor, probe, momentum: Named, settings, scale=1.0):
    """(logits with their graph, `Verdict`) of L2R, the pass of whose step is that in which its labels are judged.

    As `judge` otherwise; `net` is the network as it is trained, in its wrapper, `own` that network.
    """
    loss, direction = _ask(own, None, probe, momentum, settings, scale)
    logits, tangent = step_along(net, own, direction, image)
    score = alignment(logits.detach(), label, tangent)
    return logits, Verdict(weights_of(score, settings.meta_step or 1.0), None, loss)


def _ask(net, inner, probe, momentum, s, scale):
    images, truth = probe
    inertia = s.meta_momentum if s.method == "ieg" else 0.0

    def loss(forward):
        return soft_loss(forward(images), truth).mean()

    return probe_direction(net, inner, momentum, loss, s.meta_step, inertia, s.decay, scale)


def label_losses(logits: Tensor, label: Tensor, pseudo: Tensor | None, verdict, args) -> dict[str, Tensor]:
    """`omega`: the loss of the given labels, weighted; of IEG also `lambda`, that of the labels as decided. Scalars.

    Eq. 5 of IEG; the weighted labels are trust x given + (1 - trust) x pseudo label, as where they were judged.
    --no-reweight gives all the same weight, --no-relabel keeps all labels.
    """
    target = decided = label
    if args.method == "ieg" and args.relabel:
        target = blend(label, pseudo, args.grad_eps_init)
        decided = torch.where(verdict.keep[:, None], label, pseudo)
    loss = soft_loss(logits, target)
    omega = (verdict.weight * loss).sum() if args.method == "l2r" or args.reweight else loss.mean()
    return {"omega": omega} if args.method == "l2r" else {"omega": omega, "lambda": soft_loss(logits, decided).mean()}


def total(parts: dict[str, Tensor], ce_factor: float, consistency_factor: float) -> Tensor:
    """The loss of a step, without weight decay, from `omega`, `lambda`, `probe`, `mixed` and `kl`, where they are.

    `omega` and `lambda` count one half each, as released; `omega` alone, of L2R, counts whole.
    """
    loss = (parts["omega"] + parts["lambda"]) / 2 if "lambda" in parts else parts["omega"]
    if "mixed" in parts:
        loss = loss + parts["probe"] + ce_factor * parts["mixed"]
    return loss + consistency_factor * parts["kl"] if "kl" in parts else loss


class Mixed(NamedTuple):
    """Rows of a mixed batch: N that begin with images of the probe, N with weak views, N with strong ones."""

    image: Tensor  # (3N, 3, H, W), in the units of the images
    share: Tensor  # (3N,), what a row keeps of itself
    partner: Tensor  # (3N,) int64, the row that the rest comes from
    pick: Tensor  # (N,) int64, the probe image in each of the first rows

    def labels(self, probe: Tensor, pseudo: Tensor) -> Tensor:
        """The same mixture of the labels, (3N, C)."""
        return mix_rows(torch.cat([probe[self.pick], pseudo, pseudo]), self.share, self.partner)


def draw_mixture(weak: Tensor, strong: Tensor, probe: Tensor, true_beta: bool = False) -> Mixed:
    """Mix the images of a batch by MixUp, drawn by torch's generators."""
    count, device = 3 * len(weak), weak.device
    pick, partner = torch.randint(len(probe), (len(weak),)), torch.randperm(count)
    pick, partner = (index.to(device, non_blocking=True) for index in (pick, partner))
    share = mixup_shares(torch.rand(count, device=device), true_beta)
    return Mixed(mix_rows(torch.cat([probe[pick], weak, strong]), share, partner), share, partner, pick)


def further_losses(logits: list[Tensor], mixed: Mixed | None, probe: Tensor, pseudo: Tensor, args) -> dict[str, Tensor]:
    """`probe` and `mixed`, the losses of mixed rows that begin with the probe and of others, and `kl`; what is wanted.

    `logits` are those of the weak and the strong view and, where there is one, of the mixture.
    """
    parts = {}
    if mixed is not None:
        ours, others = mixed_losses(logits[2], mixed.labels(probe, pseudo), len(pseudo), args.logit_norm)
        parts |= {"probe": ours.mean(), "mixed": others.mean()}
    if args.consistency_factor > 0:
        parts["kl"] = consistency(*logits[:2]).mean()
    return parts


def log_of(verdict: Verdict, pseudo: Tensor | None, batch: dict) -> dict:
    """For the log: what was kept and how much of it was right, pseudo labels, effective sample size, probe loss."""
    right, keep = batch["noisy"] == 0, verdict.keep
    found = {"effective_share": effective_share(verdict.weight)[None], "probe_loss": verdict.probe_loss[None]}
    found["zero_weight"] = (verdict.weight == 0).float()
    if keep is not None:
        found |= {"kept_share": keep.float(), "kept_precision": (keep & right, keep)}
    if pseudo is not None:
        found["pseudo_accuracy"] = (pseudo.argmax(1) == batch["truth"]).float()
    pairs = {name: value for name, value in found.items() if isinstance(value, tuple)}
    return pairs | {name: value.mean()[None] for name, value in found.items() if name not in pairs}
