"""The images and masks of one CSV list: decoded once, kept in memory, augmented by (seed, epoch, index)."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from utils.errors import InputError, report_bad_rows, warn
from utils.images import IGNORE, read_pair, resize_image, resize_mask
from utils.lists import read_list

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for its newest version at import
import albumentations as A

cv2.setNumThreads(0)  # lists are decoded by several threads already, and loader processes must not start more


class ListDataset(Dataset):
    """Samples of a list: `image` (H, W, 3) uint8, `mask` (H, W) uint8, `noisy`, and `weight` if it has one.

    `noisy` is 1 for a mask known to be noisy (`iterations` above 0), 0 for one known to be clean, -1 where nobody
    knows. Every file is decoded when the list is opened, so a bad row is an InputError before the first epoch; what
    exceeds `cache_gb` is decoded again when asked for. `size` 0 keeps images as they are.
    """

    def __init__(self, path, root=".", size=0, classes=1, weighted=False, augment="none", seed=0, cache_gb=8.0):
        self.frame = read_list(path, ("img", "filename", "weight") if weighted else ("img", "filename"))
        self.path, self.root, self.size, self.classes = path, Path(root), size, classes
        self.seed, self.epoch = seed, 0
        self.augment = augmentation(augment, classes)
        self.weight = self.frame["weight"].to_numpy(np.float32) if weighted else None
        known = "iterations" in self.frame
        self.noisy = np.sign(self.frame["iterations"].to_numpy()) if known else np.full(len(self.frame), -1)
        self.cache, self.shapes = self._decode_all(cache_gb * 1e9)

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, i):
        image, mask = self.cache[i] or self._decode(i)
        if self.augment is not None:
            self.augment.set_random_seed(int(np.random.SeedSequence([self.seed, self.epoch, i]).generate_state(1)[0]))
            both = self.augment(image=image, mask=mask)
            image, mask = both["image"], both["mask"]
        sample = {
            "image": torch.from_numpy(image),
            "mask": torch.from_numpy(mask),
            "noisy": int(self.noisy[i]),
            "index": i,
        }
        return sample if self.weight is None else sample | {"weight": self.weight[i]}

    def one_shape(self) -> bool:
        """Whether all images have the same height and width, so that they fit in batches."""
        return len(set(self.shapes)) == 1

    def _decode(self, i):
        row = self.frame.iloc[i]
        image, mask = read_pair(self.root / row["img"], self.root / row["filename"], self.classes)
        return (resize_image(image, self.size), resize_mask(mask, self.size)) if self.size else (image, mask)

    def _try_decode(self, i):
        try:
            return self._decode(i)
        except InputError as error:
            return error

    def _decode_all(self, room):
        cache, shapes, bad, labelled = [], [], [], False
        with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
            found = pool.map(self._try_decode, range(len(self)))
            for i, pair in enumerate(tqdm(found, f"reading {self.path}", len(self), leave=False, disable=None)):
                if isinstance(pair, InputError):
                    bad.append((int(self.frame["line"].iloc[i]), str(pair)))
                    continue
                room -= pair[0].nbytes + pair[1].nbytes
                cache.append(pair if room >= 0 else None)
                shapes.append(pair[1].shape)
                labelled = labelled or (self.classes > 1 and bool(((pair[1] > 0) & (pair[1] != IGNORE)).any()))
        report_bad_rows(self.path, bad, "Correct or remove these rows.")
        if self.classes > 1 and not labelled:
            what = "no mask holds a class above 0 other than 255, which means ignore"
            raise InputError(f"{self.path}: {what}; for 0/255 masks use --classes 1")
        return cache, shapes


def augmentation(kind: str, classes: int = 1):
    """None, or an albumentations pipeline: "flip" mirrors left-right, "strong" also moves, colours and blurs.

    Outside the frame image and mask are continued by reflection, so that no label is invented; masks are moved by
    nearest neighbour.
    """
    if kind == "none":
        return None
    flip = A.HorizontalFlip(p=0.5)
    if kind == "flip":
        return A.Compose([flip])
    move = A.Affine(
        scale=(0.7, 1.4),
        rotate=(-20, 20),
        shear=(-8, 8),
        translate_percent=(-0.1, 0.1),
        interpolation=cv2.INTER_LINEAR,
        mask_interpolation=cv2.INTER_NEAREST,
        border_mode=cv2.BORDER_REFLECT_101,
        p=0.8,
    )
    colour = [A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), A.ToGray(p=0.1), A.RandomGamma((70, 140), p=0.3)]
    blur = A.OneOf([A.GaussianBlur((3, 5)), A.GaussNoise((0.02, 0.08))], p=0.3)
    return A.Compose([flip, move, *colour, blur])


def open_lists(args, weighted: bool = False) -> list[ListDataset]:
    """The training, validation and (if there is one) test list of the flags, all files checked; InputError as found."""
    for flag in ("train_csv", "valid_csv"):
        if not getattr(args, flag):
            raise InputError(f"--{flag}: name a list")
    how = {"root": args.data_root, "size": args.size, "classes": args.classes, "cache_gb": args.cache_gb}
    lists = {"train": ListDataset(args.train_csv, weighted=weighted, augment=args.augment, seed=args.seed, **how)}
    lists["valid"] = ListDataset(args.valid_csv, **how)
    if args.test_csv:
        lists["test"] = ListDataset(args.test_csv, **how)
        check_leak(lists["test"], lists["train"], lists["valid"])
    seen = {_real(lists["train"], row) for row in lists["train"].frame.itertuples()}
    both = sum(_real(lists["valid"], row) in seen for row in lists["valid"].frame.itertuples())
    if both and args.select == "best":
        warn(f"{both} images of {args.valid_csv} are also trained on; they flatter the checkpoint it chooses")
    if args.batch_size > 1 and not lists["train"].one_shape():
        raise InputError(f"{args.train_csv}: images of different sizes with --size 0; use --size N or --batch-size 1")
    return list(lists.values())


def check_leak(held: ListDataset, *others: ListDataset) -> None:
    """Raise InputError where an image of the held-out list is also in another list, under whatever path."""
    where = {_real(held, row): row.line for row in held.frame.itertuples()}
    for other in others:
        found = [(row.line, row.img, where.get(_real(other, row))) for row in other.frame.itertuples()]
        bad = [(line, f"{img} is also in {held.path} line {there}") for line, img, there in found if there]
        report_bad_rows(other.path, bad, "No image may be in both lists.")


def _real(dataset, row):
    return os.path.realpath(dataset.root / row.img)
