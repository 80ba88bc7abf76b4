"""The images and masks of one CSV list: decoded once, kept on disk or in memory, augmented by (seed, epoch, index)."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from utils.augment import augmentation, flip
from utils.errors import InputError, report_bad_rows, warn
from utils.images import IGNORE, read_image, read_mask, read_pair, resize_image, resize_mask
from utils.lists import read_list
from utils.store import Store, evict, in_threads, key_of, stamp_files

cv2.setNumThreads(0)  # lists are decoded by several threads already, and loader processes must not start more


class ListDataset(Dataset):
    """Samples of a list: `image` (H, W, 3) uint8, `mask` (H, W) uint8, `noisy`, `index`, and `weight` if it has one.

    `noisy` is 1 for a mask known to be noisy (`iterations` above 0), 0 for one known to be clean, -1 where nobody
    knows. Every file is looked at when the list is opened and decoded unless `cache_dir` remembers it, so a bad row is
    an InputError before the first epoch. The decoded list stays in `cache_dir`, shared by all processes, or in memory
    without one; what exceeds `cache_gb` is decoded again when asked for. `size` 0 keeps images as they are.
    """

    planes = ()  # beyond (H, W) of what is kept as a mask
    need = ("img", "filename")

    def __init__(
        self, path, root=".", size=0, classes=1, weighted=False, augment="none", seed=0, cache_gb=8.0, cache_dir=None
    ):
        self.frame = read_list(path, (*self.need, "weight") if weighted else self.need)
        self.path, self.size, self.classes, self.root = path, size, classes, root
        self.files = self._paths()
        self.seed = seed
        self.now = torch.zeros((), dtype=torch.int64).share_memory_()  # the epoch; loader processes see it too
        self.augment = augmentation(augment)
        self.weight = self.frame["weight"].to_numpy(np.float32) if weighted else None
        known = "iterations" in self.frame
        noisy = np.sign(self.frame["iterations"].to_numpy()) if known else np.full(len(self.frame), -1)
        self.noisy = noisy.astype(np.int64)
        stamps = self._stamp()
        self.real = [path for path, *_ in stamps[0]]
        self.images, self.masks, self.shapes, self.sizes, labelled = self._open(cache_dir, cache_gb * 1e9, stamps)
        if classes > 1 and not labelled:
            what = "no mask holds a class above 0 other than 255, which means ignore"
            raise InputError(f"{path}: {what}; for 0/255 masks use --classes 1")

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, i):
        image, mask = self._augmented(i)
        # arrays of a store cannot be written to, those in memory must not be
        sample = {"image": torch.from_numpy(image.copy()), "mask": torch.from_numpy(mask.copy())}
        sample |= {"noisy": int(self.noisy[i]), "index": int(i)}
        return sample if self.weight is None else sample | {"weight": self.weight[i]}

    def __getitems__(self, indices):
        """The batch of these samples: `image` (B, H, W, 3), ..., each pixel copied once; for loaders with `collate`."""
        shape = self.shapes[indices[0]]
        if (self.shapes[indices] != shape).any():
            raise ValueError(f"{self.path}: images of different sizes in one batch")
        image = torch.empty((len(indices), *shape, 3), dtype=torch.uint8)
        mask = torch.empty((len(indices), *shape, *self.planes), dtype=torch.uint8)
        for i, to_image, to_mask in zip(indices, image.numpy(), mask.numpy(), strict=True):
            to_image[:], to_mask[:] = self._augmented(i)
        batch = {"image": image, "mask": mask, "noisy": torch.from_numpy(self.noisy[indices])}
        batch["index"] = torch.as_tensor(indices, dtype=torch.int64)
        return batch if self.weight is None else batch | {"weight": torch.from_numpy(self.weight[indices])}

    @staticmethod
    def collate(batch: dict) -> dict:
        """What `__getitems__` returns is a batch already."""
        return batch

    @property
    def epoch(self) -> int:
        return int(self.now)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.now.fill_(epoch)

    def takes_time(self) -> bool:
        """Whether samples are decoded or strongly augmented when they are asked for."""
        return self.images[0] is None or self.images[len(self) - 1] is None or self.augment not in (None, flip)

    def one_shape(self) -> bool:
        """Whether all images have the same height and width, so that they fit in batches."""
        return bool((self.shapes == self.shapes[0]).all())

    def plain(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) and mask (H, W) as they are before any augmentation, not to be written to."""
        return self._pair(i)

    def clean_known(self) -> bool:
        """Whether the list names a clean mask, which is there, for every image (column `clean`)."""
        if "clean" not in self.frame:
            return False
        missing = sum(not Path(self.root, name).is_file() for name in self.frame["clean"])
        if missing:
            warn(f"{self.path}: {missing} masks of the column clean are not there; labels are not compared with them")
        return not missing

    def clean(self, i: int) -> np.ndarray:
        """The clean mask of an image, (H, W) as it is trained on."""
        return self._resized(read_mask(Path(self.root, self.frame["clean"].iloc[i]), self.classes), resize_mask)[0]

    def _pair(self, i):
        if self.images[i] is None:
            return tuple(array for array, _ in self._decode(i))
        return self.images[i], self.masks[i]

    def side(self) -> int:
        """The median of the shorter sides of the image files, in pixels."""
        return int(np.median(self.sizes.min(1)))

    def _augmented(self, i):
        image, mask = self._pair(i)
        if self.augment is None:
            return image, mask
        return self.augment(image, mask, self.key(i))

    def key(self, i: int) -> int:
        """The seed of what is drawn for image `i` in this epoch."""
        return int(np.random.SeedSequence([self.seed, self.epoch, i]).generate_state(1)[0])

    def _paths(self):
        return [[str(Path(self.root, name)) for name in self.frame[column]] for column in ("img", "filename")]

    def _stamp(self):
        found = stamp_files(self.files[0] + self.files[1])
        pairs = list(zip(found[: len(self)], found[len(self) :], strict=True))
        wrong = [(i, [one for one in pair if isinstance(one, InputError)]) for i, pair in enumerate(pairs)]
        self._report([(i, errors[0]) for i, errors in wrong if errors])
        return found[: len(self)], found[len(self) :]

    def _report(self, bad):
        bad = [(int(self.frame["line"].iloc[i]), str(what)) for i, what in bad]
        report_bad_rows(self.path, bad, "Correct or remove these rows.")

    def _open(self, cache_dir, room, stamps):
        if cache_dir:
            try:
                return self._open_stores(Path(cache_dir).absolute(), room, stamps)
            except OSError as error:
                why = f"decoded images cannot be kept there ({error.strerror or error})"
                _warn_once(f"{cache_dir}: {why}; every process keeps its own in memory")
        return self._fill_memory(room)

    def _open_stores(self, folder, room, stamps):
        images = Store(folder / key_of("image", stamps[0], self.size), (3,))
        masks = Store(folder / key_of("mask", stamps[1], self.size, self.classes, *self.planes), self.planes)
        built = False
        try:
            while lacking := [store for store in (images, masks) if not store.acquire(room)]:
                self._fill_stores(images, masks, lacking, room)
                images.release()
                masks.release()
                built = True
            sizes = images.index["sizes"], masks.index["sizes"]
            self._every(np.flatnonzero((sizes[0] != sizes[1]).any(1)), self._decode, lambda *_: None)
            arrays = images.arrays(), masks.arrays()
            if built and None not in arrays:
                evict(folder, 4 * room)
            if None in arrays:
                arrays = [None] * len(self), [None] * len(self)
            return *arrays, images.index["shapes"], sizes[0], bool(masks.index["labelled"])
        finally:
            images.release()
            masks.release()

    def _fill_stores(self, images, masks, lacking, room):
        fits = not self.size or 4 * len(self) * self.size**2 <= room
        for store in lacking:
            store.begin(fits)

        def decode(i):
            if len(lacking) == 2:
                return self._decode(i)
            new = self._decode_image(i) if images in lacking else self._decode_mask(i)
            if new[1] != tuple((masks if images in lacking else images).index["sizes"][i].tolist()):
                self._decode(i)  # says what is wrong with the pair
            return [new]

        def keep(*arrays):
            for store, (array, size) in zip(lacking, arrays, strict=True):
                store.add(array, size, store is masks and self._labels(array), room)

        self._every(range(len(self)), decode, keep)
        for store in lacking:
            store.commit()

    def _fill_memory(self, room):
        images, masks, shapes, sizes, labelled = [], [], [], [], False

        def keep(image, mask):
            nonlocal room, labelled
            room -= image[0].nbytes + mask[0].nbytes
            images.append(image[0] if room >= 0 else None)
            masks.append(mask[0] if room >= 0 else None)
            shapes.append(mask[0].shape[:2])
            sizes.append(image[1])
            labelled = labelled or self._labels(mask[0])

        self._every(range(len(self)), self._decode, keep)
        return images, masks, np.array(shapes), np.array(sizes), labelled

    def _every(self, rows, decode, keep):
        """keep(*decode(i)) for these rows, in order, and one InputError for all that are bad."""

        def attempt(k):
            try:
                return decode(rows[k])
            except InputError as error:
                return error

        bad, found = [], in_threads(attempt, range(len(rows)))
        for i, what in zip(
            rows, tqdm(found, f"reading {self.path}", len(rows), leave=False, disable=None), strict=True
        ):
            if isinstance(what, InputError):
                bad.append((i, what))
            elif not bad:
                keep(*what)
        self._report(bad)

    def _decode(self, i):
        image, mask = read_pair(self.files[0][i], self.files[1][i], self.classes)
        return self._resized(image, resize_image), self._finished(i, mask)

    def _decode_image(self, i):
        return self._resized(read_image(self.files[0][i]), resize_image)

    def _decode_mask(self, i):
        return self._finished(i, read_mask(self.files[1][i], self.classes))

    def _finished(self, i, mask):
        return self._resized(mask, resize_mask)

    def _resized(self, array, resize):
        """The array as it is used, and the (H, W) of its file."""
        return resize(array, self.size) if self.size else array, array.shape[:2]

    def _labels(self, mask):
        return self.classes > 1 and bool(((mask > 0) & (mask != IGNORE)).any())


@cache
def _warn_once(text):
    warn(text)


def reading(args) -> dict:
    """How the flags of a run say that any of its lists is read and kept: arguments of a `ListDataset`."""
    how = {"root": args.data_root, "size": args.size, "classes": args.classes, "cache_gb": args.cache_gb}
    return how | {"cache_dir": args.cache_dir or Path(args.run_dir) / ".cache"}


def open_lists(args, weighted: bool = False, kind: type = ListDataset) -> list[ListDataset]:
    """The training (a `kind`), validation and (if there is one) test list of the flags, all files checked."""
    for flag in ("train_csv", "valid_csv"):
        if not getattr(args, flag):
            raise InputError(f"--{flag}: name a list")
    how = reading(args)
    lists = {"train": kind(args.train_csv, weighted=weighted, augment=args.augment, seed=args.seed, **how)}
    lists["valid"] = ListDataset(args.valid_csv, **how)
    if args.test_csv:
        lists["test"] = ListDataset(args.test_csv, **how)
        check_leak(lists["test"], lists["train"], lists["valid"])
    seen = set(lists["train"].real)
    both = sum(path in seen for path in lists["valid"].real)
    if both and args.select == "best":
        warn(f"{both} images of {args.valid_csv} are also trained on; they flatter the checkpoint it chooses")
    if args.batch_size > 1 and not lists["train"].one_shape():
        raise InputError(f"{args.train_csv}: images of different sizes with --size 0; use --size N or --batch-size 1")
    return list(lists.values())


def check_leak(held: ListDataset, *others: ListDataset) -> None:
    """Raise InputError where an image of the held-out list is also in another list, under whatever path."""
    where = dict(zip(held.real, held.frame["line"], strict=True))
    for other in others:
        rows = zip(other.real, other.frame["line"], other.frame["img"], strict=True)
        bad = [(line, f"{img} is also in {held.path} line {where[real]}") for real, line, img in rows if real in where]
        report_bad_rows(other.path, bad, "No image may be in both lists.")
