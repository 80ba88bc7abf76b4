"""Masks that a training run replaces, all at once, by better ones, and networks that begin anew with them."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
from tqdm import tqdm

from utils.checkpoint import bare
from utils.corrected import CorrectedDataset, files_to_disk
from utils.dataset import ListDataset, check_leak, reading
from utils.errors import InputError
from utils.images import write_mask
from utils.losses import hard
from utils.scores import pair_scores


@torch.inference_mode()
def relabel(run, net, dataset: CorrectedDataset, version: int, change: Callable) -> dict[str, float]:
    """Write version `version` of every mask: `change`(logits (C, H, W) float32, given mask (H, W)) -> (H, W) uint8.

    The network predicts the images as they are, without augmentation. All processes call it, each for its share of the
    images. Returns the share of pixels that `changed` and, where the list knows the clean masks, `label_dice`, the mean
    Dice of the new masks with them.
    """
    run.share_buffers(net)
    net, size = bare(net).eval(), run.args.batch_size if dataset.one_shape() else 1
    own, classes, compare = range(run.rank, len(dataset), run.world), run.args.classes, dataset.clean_known()
    dataset.kept_at(0, version).parent.mkdir(parents=True, exist_ok=True)
    changed = pixels = dice = 0.0
    for first in tqdm(range(0, len(own), size), "correcting", leave=False, disable=None if run.main else True):
        rows = own[first : first + size]
        images, masks = zip(*(dataset.plain(i) for i in rows), strict=True)
        with run.autocast():
            logits = net(torch.from_numpy(np.stack(images)).to(run.device).permute(0, 3, 1, 2))
        for i, one, before in zip(rows, logits.float().cpu().numpy(), masks, strict=True):
            mask = change(one, dataset.given(i))
            write_mask(dataset.kept_at(i, version), mask, classes)
            changed, pixels = changed + (mask != before).sum(), pixels + mask.size
            if compare:
                dice += pair_scores(mask, dataset.clean(i), classes)["dice"]
    files_to_disk([dataset.kept_at(i, version) for i in own], dataset.kept_at(0, version).parent)
    sums = run.sum(torch.tensor([changed, pixels, dice], dtype=torch.float64, device=run.device)).tolist()
    found = {"changed": sums[0] / sums[1]}
    return found | ({"label_dice": sums[2] / len(dataset)} if compare else {})


@torch.inference_mode()
def list_mean(run, net, loader, measure: Callable) -> torch.Tensor:
    """The mean over a list, (classes,) float64, of `measure`(predicted, true mask): (H, W) uint8 each -> (classes,).

    Every image counts once, however many processes share the list; a NaN does not, and the mean of nothing is one.
    """
    run.share_buffers(net)
    net = bare(net).eval()
    total, count = torch.zeros(2, run.args.classes, dtype=torch.float64)
    for batch in run.batches(loader):
        with run.autocast():
            pred = hard(net(batch["image"]))
        pairs = zip(pred.cpu().numpy(), batch["mask"].cpu().numpy(), strict=True)
        values = torch.from_numpy(np.stack([measure(*pair) for pair in pairs]))
        total, count = total + values.nan_to_num().sum(0), count + (~values.isnan()).sum(0)
    return torch.divide(*run.sum(torch.stack([total, count]).to(run.device)).cpu())


class Restart:
    """The states that the parts of a run have now, to which `again` takes them back: networks, optimizers, ..."""

    def __init__(self, *parts):
        self.parts, self.states = parts, [deepcopy(bare(part).state_dict()) for part in parts]

    def again(self) -> None:
        for part, state in zip(self.parts, self.states, strict=True):
            bare(part).load_state_dict(deepcopy(state))


def open_trusted(args, lists: list[ListDataset]) -> ListDataset:
    """The clean list of `--trusted_csv`, or the validation list where it is not given; none of it may be tested on.

    `lists` are the training, validation and, where there is one, test list. InputError for a list that says itself that
    a mask is noisy, unless nothing is measured on it (`--rounds 0`).
    """
    if not args.trusted_csv:
        return _clean(lists[1], args)
    trusted = ListDataset(args.trusted_csv, **reading(args))
    if len(lists) == 3:
        check_leak(lists[2], trusted)
    return _clean(trusted, args)


def _clean(trusted, args):
    noisy = np.flatnonzero(trusted.noisy == 1)
    if args.rounds and len(noisy):
        row = trusted.frame.iloc[noisy[0]]
        what = f"{len(noisy)} masks are noisy by the column iterations, the first in line {row['line']}: {row['img']}"
        remedy = "A bias is measured on clean masks: name a list of such with --trusted_csv"
        raise InputError(f"{trusted.path}: {what}. {remedy}")
    return trusted
