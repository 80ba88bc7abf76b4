"""Lists whose rows also say how far a teacher supports the mask at every pixel (column `support`)."""

from pathlib import Path

import cv2
import numpy as np

from utils.dataset import ListDataset, open_lists
from utils.errors import InputError
from utils.images import check_sizes, read_mask
from utils.label_quality import trust
from utils.store import stamp_files

ANY = 256  # classes: every grey value is one


class SupportedDataset(ListDataset):
    """A `ListDataset` whose samples also have `support` (H, W) uint8: the teacher's p(given label) x 255.

    The files of the column `support` are grey PNGs of the size of the masks, as utils/predict_mask.py --support writes
    them. They are resized by area or bilinearly, and move with the mask in every augmentation.
    """

    planes = (2,)  # label and support, so that whatever moves one moves the other

    def __getitem__(self, i):
        return _split(super().__getitem__(i))

    def __getitems__(self, indices):
        return _split(super().__getitems__(indices))

    def plain(self, i):
        image, mask = super().plain(i)
        return image, mask[..., 0]

    def _stamp(self):
        if "support" not in self.frame:
            remedy = "write the list with utils/predict_mask.py --support"
            raise InputError(f"{self.path}: no column `support`, which --level pixel and both need; {remedy}")
        self.support = [str(Path(self.root, name)) for name in self.frame["support"]]
        images, masks = super()._stamp()
        found = stamp_files(self.support)
        self._report([(i, one) for i, one in enumerate(found) if isinstance(one, InputError)])
        return images, masks + found

    def _finished(self, i, mask):
        support = read_mask(self.support[i], ANY)
        check_sizes(self.files[1][i], mask.shape, self.support[i], support.shape)
        label, size = super()._finished(i, mask)
        if support.shape != label.shape:
            how = cv2.INTER_AREA if min(support.shape) >= min(label.shape) else cv2.INTER_LINEAR
            support = cv2.resize(support, label.shape[::-1], interpolation=how)
        return np.stack([label, support], -1), size

    def _labels(self, mask):
        return super()._labels(mask[..., 0])


def _split(batch: dict) -> dict:
    both = batch["mask"]
    return batch | {"mask": both[..., 0].contiguous(), "support": both[..., 1].contiguous()}


def open_weighted(args) -> list[ListDataset]:
    """`open_lists` with weights for the training images, with --level pixel support for their pixels.

    With --level both there are both, and a weight says how far the mask is to be trusted: `trust` of its score.
    """
    if args.level != "sample" and args.compat == "nlkd":
        raise InputError(f"--level {args.level}: the released code has one weight an image; leave --compat nlkd out")
    if not 0 <= args.sure <= 1:
        raise InputError(f"--sure {args.sure}: must lie between 0 and 1")
    if args.level == "sample":
        return open_lists(args, weighted=True)
    train, *others = open_lists(args, weighted=args.level == "both", kind=SupportedDataset)
    if args.level == "both":
        train.weight = trust(train.weight).astype(np.float32)
    return [train, *others]
