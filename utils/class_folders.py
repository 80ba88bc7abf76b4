"""Images in one folder a class, and which classes these are: CIFAR, WebVision-mini."""

import fcntl
import re
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.images import read_image
from utils.store import in_threads

SUFFIXES = {".jpg", ".jpeg", ".png"}
# the order of their labels, in which the pairs of asymmetric noise are given
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Pixels:
    """Images in memory: (N, H, W, 3) uint8; `large` ones are read when they are asked for, from `names`."""

    def __init__(self, names, array=None):
        self.names, self.array, self.large = list(names), array, array is None

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        return read_image(self.names[i]) if self.large else self.array[i]

    def some(self, rows) -> "Pixels":
        """These images."""
        return Pixels([self.names[i] for i in rows], None if self.large else self.array[rows])


def class_names(folder: Path) -> list[str]:
    """The names of the class folders in `folder`, sorted; none where there is no such folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def read_cifar(kind: str, root: Path, download: bool, ordered: bool = False) -> list[tuple[Pixels, np.ndarray]]:
    """The training and the test images of CIFAR with their labels: class folders below `root`, or torchvision's files.

    InputError for folders that do not hold the classes of `kind`, the same in both parts; with `ordered` also where
    their order is not that of CIFAR's labels.
    """
    folders = [root / part for part in ("train", "test")]
    if not any(folder.is_dir() for folder in folders):
        return [_from_torchvision(kind, root, part, download) for part in ("train", "test")]
    names, others = map(class_names, folders)
    classes = 10 if kind == "cifar10" else 100
    if names != others:
        what = [_listed("lacks", set(names) - set(others)), _listed("has besides", set(others) - set(names))]
        raise InputError(
            f"{folders[1]}: {' and '.join(filter(None, what))}; its class folders must be those of {folders[0]}"
        )
    if len(names) != classes:
        raise InputError(f"{folders[0]}: {len(names)} class folders ({_some(names)}); {kind} has {classes}")
    if ordered:
        _check_order(kind, folders[0], names)
    return [read_folder(folder, names, keep=True) for folder in folders]


def _check_order(kind, folder, names):
    """Folders may have the classes' names, with or without their numbers, or the numbers alone."""
    for k, name in enumerate(names):
        number, word = re.fullmatch(r"([0-9]*)[-_ ]*(.*)", name).groups()
        if (not number or int(number) == k) and (not word or kind != "cifar10" or word.lower() == CIFAR10[k]):
            continue
        expected = CIFAR10[k] if kind == "cifar10" else f"{k:02d}"
        remedy = f"name the folders {CIFAR10[0]} to {CIFAR10[-1]}" if kind == "cifar10" else "number them 00 to 99"
        raise InputError(f"{folder}/{name}: asymmetric noise needs class {k} ({expected}) in this place; {remedy}")


def _from_torchvision(kind, root, part, download):
    import torchvision

    try:
        with _alone(root) if download else nullcontext():
            made = getattr(torchvision.datasets, kind.upper())(root, train=part == "train", download=download)
    except (RuntimeError, OSError) as error:
        what = str(error).splitlines()[0]
        remedy = "fetch it with --download, or name a folder with train/CLASS/*.png and test/CLASS/*.png"
        raise InputError(f"--data-root {root}: {kind} is not there ({what}); {remedy}") from None
    names = [f"{part}/{i:05d}" for i in range(len(made.targets))]
    return Pixels(names, np.asarray(made.data)), np.asarray(made.targets, np.int64)


@contextmanager
def _alone(root):
    """Have one process at a time fetch into a folder; the others find it there."""
    Path(root).mkdir(parents=True, exist_ok=True)
    with (Path(root) / ".download.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_folder(folder: Path, names: list[str], keep: bool = False) -> tuple[Pixels, np.ndarray]:
    """The images of the class folders `names` in `folder`, and the places of these in `names`; in memory with `keep`.

    InputError for a class without a folder or an image, a file that cannot be read, and images to be kept that differ
    in size.
    """
    lacking = set(names) - set(class_names(folder))
    if lacking:
        raise InputError(f"{folder}: {_listed('lacks', lacking)}; every class of train is needed there")
    files = [sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES) for name in names]
    empty = [name for name, group in zip(names, files, strict=True) if not group]
    if empty:
        raise InputError(f"{folder}: no image (.png, .jpg) in {_some(empty)}; every class needs some")
    paths = [str(path) for group in files for path in group]
    labels = np.repeat(np.arange(len(names)), [len(group) for group in files])
    if not keep:
        return Pixels(paths), labels
    arrays = list(in_threads(read_image, paths))
    odd = next((path for path, one in zip(paths, arrays, strict=True) if one.shape != arrays[0].shape), None)
    if odd:
        raise InputError(f"{odd}: another size than {paths[0]}; images of one size are needed")
    return Pixels(paths, np.stack(arrays)), labels


def read_webvision(root: Path, classes: int) -> list[tuple[Pixels, np.ndarray]]:
    """Training, validation and probe images of the first `classes` class folders of `root`/train, by name.

    InputError where there are fewer, or where one of these is missing or empty in another part.
    """
    names = class_names(root / "train")
    if len(names) < classes:
        raise InputError(f"{root / 'train'}: {len(names)} class folders; {classes} are needed")
    return [read_folder(root / part, names[:classes]) for part in ("train", "val", "probe")]


def fewer(images: Pixels, truth: np.ndarray, count: int, seed: int, flag: str) -> tuple[Pixels, np.ndarray]:
    """The same share of every class, `count` images in all, 0: all; InputError where a class would have none."""
    if not 0 < count < len(truth):
        return images, truth
    order, classes = np.random.default_rng([seed, 2]).permutation(len(truth)), int(truth.max()) + 1
    each = count // classes
    if not each:
        raise InputError(f"{flag} {count}: fewer than the {classes} classes; every class needs an image")
    rows = np.sort(np.concatenate([order[truth[order] == label][:each] for label in range(classes)]))
    return images.some(rows), truth[rows]


def first_of_each(images: Pixels, truth: np.ndarray, count: int) -> tuple[Pixels, np.ndarray]:
    """The first `count` images of every class, class by class in turn; InputError for a class that has fewer."""
    have = Counter(truth.tolist())
    label, least = min(sorted(have.items()), key=lambda pair: pair[1])
    if least < count:
        folder = Path(images.names[int(np.flatnonzero(truth == label)[0])]).parent
        raise InputError(f"{folder}: {least} images of the probe, {count} are wanted; --dataset webvisionmini_{least}")
    rows = np.stack([np.flatnonzero(truth == label)[:count] for label in sorted(have)], 1).flatten()
    return images.some(rows), truth[rows]


def _listed(verb, names):
    return f"{verb} {_some(sorted(names))}" if names else ""


def _some(names, shown=10):
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
