"""Weak-to-strong consistency: the labels that a network gives to an image, and the views that shall have them too."""

from typing import NamedTuple

import torch
from torch import Tensor

from utils.methods.u2pl import as_classes, pseudo_labels
from utils.mixing import draw_mask, mix


class View(NamedTuple):
    """A view of N unlabelled images and what is to be learnt from it; `threshold` is none, as all share one."""

    image: Tensor  # (N, 3, H, W) uint8
    label: Tensor  # (N, H, W) int64
    confidence: Tensor  # (N, H, W), the probability of the label
    truth: Tensor  # (N, H, W) uint8, 255 where nobody knows; for the log
    threshold: Tensor | None = None


@torch.no_grad()
def label_views(run, net, batch: dict, mix_prob: float) -> tuple[View, list[View]]:
    """(the weak view, the strong views) of a batch with `weak`, `strong` and `truth`; labels are those of the weak one.

    The network labels in evaluation mode. Every strong view is mixed by CutMix with its neighbours in the batch, or
    not, by one draw for the batch (Yang et al., CVPR 2023, mix single images with those of another batch).
    """
    weak, truth = batch["weak"].permute(0, 3, 1, 2), batch["truth"]
    net.eval()
    with run.autocast():
        label, confidence, _ = pseudo_labels(as_classes(net(weak).logits))
    net.train()
    plain, views = View(weak, label, confidence, truth), []
    for strong in batch["strong"].permute(1, 0, 4, 2, 3):
        view = plain._replace(image=strong)
        if torch.rand(()) < mix_prob:
            keep = draw_mask("cutmix", label, 0)
            view = View(*(mix(values, keep) for values in view[:4]))
        views.append(view)
    return plain, views
