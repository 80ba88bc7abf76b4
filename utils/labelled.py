"""Images with one label each: CIFAR-10 and -100, class folders, WebVision-mini; noisy labels, a clean probe, views."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import Dataset

from utils.class_folders import Pixels, fewer, first_of_each, read_cifar, read_webvision
from utils.errors import InputError
from utils.label_noise import noisy_labels, per_class_of, split_probe
from utils.lists import write_list
from utils.policies import GREY, autoaugment, choose_operations, cutout, randaugment

PROBE, STRONG = 1, 2  # streams of draws beside that of the weak views
MINI, SIDE = 50, 224  # classes of WebVision-mini, pixels of its views


class Labelled(Dataset):
    """Views of some images and their labels; with a `probe`, as many of its images a batch.

    A sample: `image` (H, W, 3) uint8, `label` (noisy) and `truth` int64, `noisy`, `index`; with `strong` also that
    view, and of the probe `probe` (B, H, W, 3) and `probe_label`, in an order in which all classes come equally often.
    Draws are keyed by (seed, epoch, image), so that a sample does not depend on what was asked for before.
    """

    def __init__(self, path, images: Pixels, truth, labels=None, *, train=False, strong="", seed=0):
        self.path, self.images, self.truth, self.train = path, images, truth, train
        self.strong, self.seed = strong, seed
        self.labels = truth if labels is None else labels
        self.noisy = (self.labels != truth).astype(np.int64)
        self.frame = pd.DataFrame({"img": images.names})
        self.now = torch.zeros((), dtype=torch.int64).share_memory_()  # the epoch; loader processes see it too
        self.probe = None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {name: values[0] for name, values in self.__getitems__([i]).items()}

    def __getitems__(self, indices):
        weak = [self._weak(self, i, self._rng(i, 0)) for i in indices]
        batch = {"image": _stack(weak), "index": torch.as_tensor(indices)}
        for name in ("labels", "truth", "noisy"):
            batch[name.removesuffix("s")] = torch.from_numpy(getattr(self, name)[indices])
        if self.strong:
            # RandAugment draws its operations for the whole batch
            chosen = choose_operations(self._rng(indices[0], STRONG, 1))
            pairs = zip(weak, indices, strict=True)
            batch["strong"] = _stack([self._strong_view(image, i, chosen) for image, i in pairs])
        if self.probe is not None:
            turns, classes = len(self.probe), int(self.probe.truth.max()) + 1
            start = classes * int(self._rng(indices[0], PROBE, 1).integers(max(1, turns // classes)))
            rows = (start + np.arange(len(indices))) % turns
            pairs = zip(rows, indices, strict=True)
            batch["probe"] = _stack([self._weak(self.probe, row, self._rng(i, PROBE)) for row, i in pairs])
            batch["probe_label"] = torch.from_numpy(self.probe.truth[rows])
        return batch

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
        return bool(self.strong) or self.images.large

    def one_shape(self) -> bool:
        return True

    def side(self) -> int:
        return SIDE if self.images.large else self.images[0].shape[0]

    def _rng(self, i, *stream):
        return np.random.default_rng([self.seed, self.epoch, int(i), *stream])

    def _weak(self, source, i, rng):
        image, large = source.images[i], source.images.large
        if not self.train:
            return centre(image) if large else image
        return zoomed(image, rng) if large else shifted(image, 2, rng, 0)

    def _strong_view(self, weak, i, chosen):
        rng = self._rng(i, STRONG)
        if self.images.large:  # of the image itself, not of its weak view
            image = autoaugment(Image.fromarray(zoomed(self.images[i], rng)), "imagenet", rng)
            return np.asarray(cutout(image, 16, rng))
        image = Image.fromarray(weak)
        image = autoaugment(image, "cifar", rng) if self.strong == "autoaug" else randaugment(image, chosen, rng)
        return np.asarray(cutout(Image.fromarray(shifted(np.asarray(image), 4, rng, GREY)), 16, rng))


def shifted(image: np.ndarray, pad: int, rng: np.random.Generator, fill: int) -> np.ndarray:
    """An image moved by up to `pad` pixels, uncovering `fill`, and mirrored or not."""
    height, width = image.shape[:2]
    padded = np.full((height + 2 * pad, width + 2 * pad, 3), fill, np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    top, left, mirrored = rng.integers(2 * pad + 1), rng.integers(2 * pad + 1), rng.random() < 0.5
    found = padded[top : top + height, left : left + width]
    return found[:, ::-1] if mirrored else found


def zoomed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A part of an image, 8 to 100 % of its area and 3:4 to 4:3, at 224 pixels, mirrored or not."""
    height, width = image.shape[:2]
    for _ in range(10):
        area, ratio = height * width * rng.uniform(0.08, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(height, width)
    top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
    found = _resize(image[top : top + h, left : left + w])
    return found[:, ::-1] if rng.random() < 0.5 else found


def centre(image: np.ndarray) -> np.ndarray:
    """The middle of an image, 7/8 of its shorter side, at 224 pixels."""
    height, width = image.shape[:2]
    side = round(min(height, width) * SIDE / (SIDE + 32))
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(image[top : top + side, left : left + side])


def _resize(image):
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _stack(arrays):
    return torch.from_numpy(np.stack(arrays))


def read_dataset(text: str) -> tuple[str, str, float]:
    """`cifar10_uniform_0.8` -> ("cifar10", "uniform", 0.8); InputError for a name that is not of this form."""
    kind, _, rest = text.partition("_")
    if kind == "webvisionmini" and (not rest or rest.isdecimal()):
        return kind, "none", float(rest or 10)
    noise, _, ratio = rest.rpartition("_")
    try:
        value = float(ratio)
    except ValueError:
        value = -1.0
    if kind not in ("cifar10", "cifar100") or noise not in ("uniform", "asymmetric") or not 0 <= value <= 1:
        known = "cifar10_uniform_0.8, cifar100_asymmetric_0.4, cifar10_uniform_0 (no noise), webvisionmini"
        raise InputError(f"--dataset {text}: not a data set with its noise; such are {known}")
    return kind, noise, value


def open_labelled(args, run=None) -> tuple[Labelled, Labelled, int]:
    """(training images with noisy labels and the probe, test images, number of classes) of the flags.

    What was drawn is written to labels.csv and probe.csv of the run's folder. InputError where an earlier start of the
    run wrote something else there, so that it goes on with other images.
    """
    kind, noise, ratio = read_dataset(args.dataset)
    classes = {"cifar10": 10, "cifar100": 100, "webvisionmini": MINI}[kind]
    root = Path(args.data_root)
    if kind == "webvisionmini":
        (images, truth), test, probe = read_webvision(root, MINI)
        probe = first_of_each(*probe, int(ratio))
        kept, labels = np.arange(len(truth)), truth
    else:
        (images, truth), test = read_cifar(kind, root, args.download, ordered=noise == "asymmetric")
        images, truth = fewer(images, truth, args.train_images, args.seed, "--train-images")
        count = args.probe_per_class
        if count < 0:
            share = args.probe_dataset_hold_ratio
            share = (0.002 if classes == 10 else 0.02) if share < 0 else share
            count = per_class_of(len(truth), classes, share, cut=args.compat == "released")
        kept, rows = split_probe(truth, classes, count, args.seed)
        labels = noisy_labels(truth[kept], noise, ratio, classes, args.seed, args.include_true)
        probe = images.some(rows), truth[rows]
    strong = args.aug_type if args.method == "ieg" else ""
    how = {"train": True, "strong": strong, "seed": args.seed}
    train = Labelled(args.dataset, images.some(kept), truth[kept], labels, **how)
    if args.method != "supervised":
        if not len(probe[1]):
            raise InputError(f"--method {args.method}: it needs a probe; leave --probe-per-class 0 out")
        train.probe = Labelled(args.dataset, *probe, train=True, seed=args.seed)
    if run is not None:
        _note(run, train, probe)
    return train, Labelled(args.dataset, *fewer(*test, args.test_images, 0, "--test-images")), classes


def _note(run, train, probe):
    """Write the labels and the probe down, or see that they are those written before; the first process does."""
    drawn = pd.DataFrame({"img": train.images.names, "label": train.labels, "truth": train.truth})
    clean = pd.DataFrame({"img": probe[0].names, "label": probe[1]})
    for name, frame in (("labels.csv", drawn), ("probe.csv", clean)):
        path = run.dir / name
        if not run.main:
            continue
        if not path.exists():
            write_list(frame, path)
        # as text, since a column without a line has no type
        elif pd.read_csv(path, dtype=str, keep_default_na=False).values.tolist() != frame.astype(str).values.tolist():
            raise InputError(f"{path}: the data have changed since this run began; choose another --name")
