"""Lists of images of which only the classes are known, and the batches of strong and weak images made with them."""

import numpy as np
import torch
from torch.utils.data import Dataset

from utils.dataset import ListDataset, check_leak, open_lists, reading
from utils.errors import InputError, warn
from utils.images import IGNORE
from utils.lists import image_labels
from utils.unlabelled import PairedDataset, UnlabelledDataset


class TaggedDataset(PairedDataset):
    """A `PairedDataset` whose batches also say which classes the whole images hold.

    `present` (C,) bool is of the strong image, by its mask, and with `views` `weak_present` of the weak one, by the
    column `label` of its list; C is 2 for binary masks. `void`: a strong image with pixels of 255 holds class 0.
    """

    def __init__(self, strong: ListDataset, weak: UnlabelledDataset, views: int, void: bool = False):
        super().__init__(strong, weak, views)
        self.weak_present = image_labels(weak.frame, max(2, strong.classes), weak.path)
        self.present = _classes_of_masks(strong, void)

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        rows, _, others = self._rows(np.asarray(indices))
        batch["present"] = torch.from_numpy(self.present[rows])
        return batch | {"weak_present": torch.from_numpy(self.weak_present[others])} if self.views else batch

    def tell(self) -> None:
        """Warn of what makes weak images useless, or an evaluation too good."""
        lost = np.flatnonzero(self.weak_present.any(0) & ~self.present.any(0))
        if len(lost):
            which = f"class{'es' * (len(lost) > 1)} {', '.join(map(str, lost))}"
            what = f"{which} in its labels but in no mask of {self.path}"
            warn(f"{self.unlabelled.path}: {what}; images with them teach nothing in cross training")
        if self.present[:, 0].any() and not self.weak_present[:, 0].any():
            what = "class 0 is in masks but in no label, so that no pixel may become it"
            warn(f"{self.unlabelled.path}: {what}; if it is the background, add 0 to the labels")
        both = len(set(self.labelled.real) & set(self.unlabelled.real))
        if both:
            what = f"{both} of its images have masks in {self.path}, where PseudoNet's IoU is measured"
            warn(f"{self.unlabelled.path}: {what}; take them out of one list")


def _classes_of_masks(dataset, void):
    """(images, C) bool."""
    masks = (dataset.plain(i)[1] for i in range(len(dataset)))
    found = np.stack([np.bincount(mask.ravel(), minlength=IGNORE + 1) > 0 for mask in masks])
    present = found[:, : max(2, dataset.classes)]
    if void:
        present[:, 0] |= found[:, IGNORE]
    return present


def open_tagged(args, views: int) -> list[Dataset]:
    """The training (a `TaggedDataset`), validation and (if there is one) test list, all files and labels checked.

    Without --weak_csv the training list is the strong one alone, if neither weak images nor classes are asked for.
    """
    lists = open_lists(args)
    if not args.weak_csv:
        if views or args.class_aware:
            raise InputError("--weak_csv: name a list of images and their classes (CSV with img and label)")
        return lists
    weak = UnlabelledDataset(args.weak_csv, augment=args.augment, seed=args.seed, **reading(args))
    if args.test_csv:
        check_leak(lists[-1], weak)
    both = len(set(lists[1].real) & set(weak.real))
    if both and args.select == "best":
        warn(f"{both} images of {args.valid_csv} are in {args.weak_csv} too; they flatter the checkpoint it chooses")
    lists[0] = TaggedDataset(lists[0], weak, views, args.compat == "released")
    if not lists[0].one_shape():
        raise InputError(f"{args.weak_csv}: images of different sizes with --size 0; use --size N")
    lists[0].tell()
    return lists
