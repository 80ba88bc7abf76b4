"""Lists whose masks are corrected while a run goes on: where corrected masks are kept, read and compared."""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.checkpoint import bare
from utils.dataset import ListDataset
from utils.errors import InputError
from utils.images import IGNORE, read_mask, write_mask
from utils.logs import sync_folder
from utils.methods.early_learning import EarlyLearning, at_scales, correct_masks, log_probabilities
from utils.metrics import split_iou

KEPT = 3  # versions of corrected masks: the new one, and those that last.pt and previous.pt go on with


class CorrectedDataset(ListDataset):
    """A `ListDataset` whose masks may have been corrected, each in a file of its own below `folder`.

    They are kept at the size of training, before augmentation, so that they are augmented like those given. Only the
    number of an image's correction is in memory (`version`, which a checkpoint saves), and a mask is read when it is
    asked for: a correction needs the memory of a batch, and a run that goes on from an older checkpoint reads older
    masks.
    """

    def follow(self, version: torch.Tensor, folder: Path) -> None:
        """Read the masks of the versions (images,) int32, now and whenever they change; 0 is the given one."""
        self.version, self.folder = version, folder

    def kept_at(self, i: int, version: int) -> Path:
        """The file of a corrected mask."""
        return self.folder / f"epoch_{version:04d}" / f"{i:06d}.png"

    def _pair(self, i):
        image, mask = super()._pair(i)
        version = int(self.version[i])
        if not version:
            return image, mask
        try:
            return image, read_mask(self.kept_at(i, version), self.classes)
        except InputError as error:
            remedy = f"it holds corrected labels of this run; remove {self.folder.parent} to train again"
            raise InputError(f"{error}; {remedy}") from None

    def as_given(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The image (H, W, 3) before augmentation and the mask (H, W) that the list names."""
        return super()._pair(i)

    def given(self, i: int) -> np.ndarray:
        """The mask (H, W) that the list names."""
        return self.as_given(i)[1]


@torch.inference_mode()
def correct_labels(run, net, dataset: CorrectedDataset, early: EarlyLearning, due: list[int], args) -> dict:
    """Correct the given masks by what the network predicts for images that are not augmented.

    Concerns the classes `due` and those that were before; earlier corrections are forgotten, and of their files those
    go that no checkpoint needs. All processes call it, each for its share of the images; what they wrote is on the disk
    when it returns. Returns what to log: `corrected` classes, the share of the pixels that are not as given, and where
    clean masks are known the IoU of the labels with them, as given and as corrected.
    """
    net, own, compare = bare(net).eval(), range(run.rank, len(dataset), run.world), dataset.clean_known()
    changed = torch.zeros(len(dataset), dtype=torch.bool)
    pixels, areas = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 3, max(2, args.classes), dtype=torch.float64)
    version, turn = dataset.epoch + 1, sorted({*early.done(), *due})
    folder = dataset.kept_at(0, version).parent
    folder.mkdir(parents=True, exist_ok=True)
    size, written = args.batch_size if dataset.one_shape() else 1, []
    for first in tqdm(range(0, len(own), size), "correcting", leave=False, disable=None if run.main else True):
        rows = own[first : first + size]
        for i, old, new in zip(rows, *_corrected(run, net, dataset, rows, turn, args), strict=True):
            pixels += torch.stack([(old != new).sum(), (old != IGNORE).sum()])
            if not old.equal(new):
                changed[i] = True
                written.append(dataset.kept_at(i, version))
                write_mask(written[-1], new.numpy(), args.classes)
            if compare:
                clean = torch.from_numpy(dataset.clean(i).copy())
                areas += torch.stack([_areas(label, clean, args.classes) for label in (old, new)])
    files_to_disk(written, folder)
    changed = run.sum(changed.to(run.device, torch.int32)).cpu() > 0
    pixels, areas = run.sum(pixels.to(run.device)).tolist(), run.sum(areas.to(run.device)).cpu()
    early.note(version, due, changed)
    run.checkpoint.wait()  # until last.pt is written it is an older one that may be needed
    if run.main:
        _forget_before(folder.parent, version - KEPT + 1)
    found = {"corrected": turn, "changed_pixels": pixels[0] / max(1.0, pixels[1])}
    if compare:
        found |= {"label_iou_before": split_iou(*areas[0])["iou"], "label_iou_after": split_iou(*areas[1])["iou"]}
    return found


def _corrected(run, net, dataset, rows, turn, args):
    """The masks of some images, (N, H, W) uint8 on the CPU, as they are given and as they become."""
    images, masks = zip(*(dataset.as_given(i) for i in rows), strict=True)
    image = torch.from_numpy(np.stack(images)).to(run.device).permute(0, 3, 1, 2)
    with run.autocast():
        every = [net(image), *at_scales(net, image, args.scales)]
    probability = torch.stack([log_probabilities(logits).exp() for logits in every]).mean(0)
    before = torch.from_numpy(np.stack(masks))
    after = correct_masks(before.to(run.device), probability, turn, args.correction_threshold, args.background)
    return before, after.cpu()


def _forget_before(folder, version):
    """Remove the masks of versions below this one."""
    for path in folder.glob("epoch_*"):
        if int(path.name.removeprefix("epoch_")) < version:
            shutil.rmtree(path)


def _areas(label, clean, classes):
    """Pixels of every class in both masks, in the label, in the clean mask, (3, C) float64, where both are known."""
    known = (label != IGNORE) & (clean != IGNORE)
    label, clean, n = label[known].long(), clean[known].long(), max(2, classes)
    counts = [values.bincount(minlength=n) for values in (label[label == clean], label, clean)]
    return torch.stack(counts).double()


def files_to_disk(paths, folder):
    """Have the files that this process wrote in a folder on the disk before a checkpoint there says that they are.

    Those of the other processes may have passing names yet.
    """
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)
