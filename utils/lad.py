"""Flags of label assistance, and the label map that goes beside an image into a label-assisted network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from utils.errors import InputError
from utils.methods.distillation import annotated, labels_on, to_grid
from utils.methods.lad import agreement, label_codes, noised_label
from utils.points import dense

FEW = 20  # classes; among more, random numbers come so close that the pixel noise hides their difference


@dataclass
class LabelArgs:
    codes: Annotated[
        Literal["auto", "gaussian", "spread", "grid", "fixed"],
        "numbers that stand for classes: random, well apart, a permuted grid, or always the same; auto: gaussian, and "
        f"spread above {FEW} classes",
    ] = "auto"
    code_noise: Annotated[float, "noise of every pixel, as a share of the codes' deviation"] = 0.03
    code_gain: Annotated[float, "deviation of the codes in grey values; 0: the label is not shown"] = 100.0
    code_smooth: Annotated[int, "means over 3 x 3 pixels of the label map before the noise"] = 0


def check_label(args) -> None:
    """Raise InputError for flags of the label map that mean nothing."""
    for flag in ("code_noise", "code_gain", "code_smooth"):
        if not 0 <= getattr(args, flag) < float("inf"):
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 0 or more")


def label_map(args, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The noised label of the flags, (N, 1, H, W) float32, drawn anew, from the mask (N, H, W) uint8."""
    classes = max(2, args.classes)
    kind = args.codes if args.codes != "auto" else "gaussian" if classes <= FEW else "spread"
    codes = label_codes(mask, classes, kind, generator)
    pixels = torch.randn(mask[:, None].shape, device=mask.device, generator=generator)
    return noised_label(mask, codes, args.code_noise, args.code_gain, pixels, args.code_smooth)


def painter(device) -> torch.Generator:
    """The draws of one step's label maps, which leave those of the network, its dropout, as they are without them."""
    return torch.Generator(device).manual_seed((torch.initial_seed() + 1) % 2**63)


def shown(args, device) -> Callable:
    """How a network is evaluated that is shown the label: a function (net, batch) -> logits, with the same draws in
    every evaluation, whatever was drawn before.
    """
    generator = torch.Generator(device).manual_seed(args.seed)
    return lambda net, batch: net(batch["image"], label_map(args, batch["mask"], generator))


def consistency(args, views: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """--consistency-weight x the distance of two views' logits (N, C, H, W) on a grid; 0 for one view."""
    if len(views) == 1:
        return torch.zeros((), device=mask.device)
    stride, known = args.consistency_stride, annotated(mask, args.classes)
    grids = [to_grid(dense(view), stride, known) for view in views]
    valid = None if known is None else labels_on(known, stride)
    return args.consistency_weight * agreement(*grids, args.consistency_loss, args.consistency_temperature, valid)
