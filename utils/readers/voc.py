"""Pascal VOC 2012 segmentation, background and 20 classes, and SBD (Hariharan et al., ICCV 2011)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from scipy.io import loadmat

from utils.errors import InputError
from utils.images import look_at, write_mask
from utils.readers.common import (
    Job,
    SetArgs,
    check_masks,
    claim,
    compare_counts,
    convert,
    fetch,
    finish,
    folder_of,
    read_ids,
    remap,
    rows_of,
    table_of,
)

NAMES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
PUBLISHED = {"train": 1464, "valid": 1449, "train_sbd": 9118, "train_aug": 10582}
REMEDY = "unpack VOCtrainval_11-May-2012.tar into it, or let --download get it"
SBD_REMEDY = "unpack benchmark.tgz of SBD into it (img, cls, train.txt, val.txt), or let --download get it"


@dataclass
class VocArgs(SetArgs):
    sbd: Annotated[str, "folder of the SBD annotations; empty: VOC alone"] = ""
    download: Annotated[bool, "download what is not there by torchvision: VOC into ROOT, SBD into --sbd"] = False


def prepare(args: VocArgs) -> None:
    """Pascal VOC 2012: lists train and valid; with --sbd also train_sbd, and train_aug: both together."""
    root = _voc_root(args)
    ids = {name: read_ids(root / "ImageSets/Segmentation" / f"{name}.txt", REMEDY) for name in ("train", "val")}
    pairs = {
        name: [(root / "JPEGImages" / f"{one}.jpg", root / "SegmentationClass" / f"{one}.png") for one in ids[name]]
        for name in ids
    }
    lists = {"train": rows_of(pairs["train"], args.data_root), "valid": rows_of(pairs["val"], args.data_root)}
    converted = 0
    if args.sbd:
        extra, jobs = _sbd_pairs(args, set(ids["train"]) | set(ids["val"]))
        claim(args.out, {"dataset": "sbd", "root": str(Path(args.sbd).absolute())})
        lists["train_sbd"] = rows_of(extra, args.data_root)
        lists["train_aug"] = rows_of([*pairs["train"], *extra], args.data_root)
    compare_counts(root, {name: len(frame) for name, frame in lists.items()}, PUBLISHED)
    check_masks([mask for some in pairs.values() for _, mask in some], len(NAMES), args.workers)
    if args.sbd:
        converted = convert(jobs, args.workers)
    finish(args.out, lists, NAMES, len(NAMES), converted)


def read_sbd(path) -> np.ndarray:
    """The category segmentation of an SBD annotation (MATLAB struct GTcls), (H, W) uint8 0 to 20."""
    look_at(path)
    try:
        mask = loadmat(path)["GTcls"]["Segmentation"][0, 0]
    except Exception:  # there is no list of what a damaged file makes the reader raise
        raise InputError(f"{path}: not an SBD annotation with GTcls.Segmentation; get the file again") from None
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise InputError(f"{path}: its segmentation is {mask.ndim}-dimensional {mask.dtype}; get the file again")
    return remap(mask, table_of({value: value for value in range(len(NAMES))}), path)


def _sbd_pairs(args: VocArgs, known: set[str]) -> tuple[list[tuple[Path, Path]], list[Job]]:
    """(image, mask to be made) of the SBD images that are not in `known`, sorted, and the jobs that make the masks."""
    root = _sbd_root(args)
    ids = {one for name in ("train", "val") for one in read_ids(root / f"{name}.txt", SBD_REMEDY)}
    pairs, jobs = [], []
    for one in sorted(ids - known):
        source, target = root / "cls" / f"{one}.mat", Path(args.out, "mask", f"{one}.png")
        pairs.append((root / "img" / f"{one}.jpg", target))
        jobs.append(Job((source,), (target,), lambda s=source, t=target: write_mask(t, read_sbd(s), len(NAMES))))
    return pairs, jobs


def _voc_root(args: VocArgs) -> Path:
    names = ("SegmentationClass", "VOCdevkit/VOC2012/SegmentationClass", "VOC2012/SegmentationClass")
    if args.download and not any(Path(args.root, name).is_dir() for name in names):
        from torchvision.datasets import VOCSegmentation

        address = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
        fetch(args.root, lambda: VOCSegmentation(args.root, download=True), address)
    return folder_of(args.root, names, REMEDY).parent


def _sbd_root(args: VocArgs) -> Path:
    names = ("cls", "benchmark_RELEASE/dataset/cls", "dataset/cls")
    if args.download and not any(Path(args.sbd, name).is_dir() for name in names):
        from torchvision.datasets import SBDataset

        fetch(args.sbd, lambda: SBDataset(args.sbd, download=True), SBDataset.url)
    return folder_of(args.sbd, names, SBD_REMEDY).parent
