"""Cityscapes, 19 classes, fine and coarse annotations (Cordts et al., CVPR 2016)."""

from pathlib import Path

import pandas as pd

from utils.errors import InputError
from utils.images import IGNORE
from utils.lists import from_root
from utils.readers.common import (
    Job,
    SetArgs,
    by_name,
    check_masks,
    claim,
    compare_counts,
    convert,
    finish,
    folder_of,
    pair,
    remapping,
    rows_of,
    table_of,
)

# name and label id of the classes that count, in the order of their train ids
CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
LABEL_IDS = range(34)  # and -1, the licence plate, which 8 bits keep as 255
SPLITS = {"gtFine": ("train", "val"), "gtCoarse": ("train", "val", "train_extra")}
LISTS = {"train": "train", "val": "valid", "train_extra": "train_extra"}
PUBLISHED = {"train": 2975, "valid": 500, "train_coarse": 2975, "valid_coarse": 500, "train_extra": 19998}
REMEDY = "unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip or gtCoarse.zip into one folder"


def train_ids() -> dict[int, int]:
    """The class of every pixel value of a labelIds file: 0 to 18, 255 for what does not count."""
    ids = {value: IGNORE for value in (*LABEL_IDS, 255)}
    return ids | {label: index for index, label in enumerate(CLASSES.values())}


def prepare(args: SetArgs) -> None:
    """Cityscapes: lists train, valid (fine), train_coarse, valid_coarse (fine masks in column clean), train_extra."""
    root = Path(args.root)
    folder_of(root, ("leftImg8bit",), REMEDY)
    folder_of(root, SPLITS, REMEDY)
    claim(args.out, {"dataset": "cityscapes", "root": str(root.absolute())})
    jobs, ready, lists, fine = [], [], {}, {}
    for kind, splits in SPLITS.items():
        for split in splits:
            found = _pairs(root, kind, split)
            if not found:
                continue
            masks = {name: _mask(mask, kind, split, args.out, jobs, ready) for name, (_, mask) in found.items()}
            frame = rows_of([(found[name][0], mask) for name, mask in masks.items()], args.data_root)
            if kind == "gtFine":
                fine[split] = masks
                lists[LISTS[split]] = frame
            else:
                name = LISTS[split] if split == "train_extra" else f"{LISTS[split]}_coarse"
                lists[name] = _coarse(frame, masks, fine.get(split), args.data_root)
    if not lists:
        raise InputError(f"{root}: no annotated images; {REMEDY}")
    compare_counts(root, {name: len(frame) for name, frame in lists.items()}, PUBLISHED)
    check_masks(ready, len(CLASSES), args.workers)
    converted = convert(jobs, args.workers)
    finish(args.out, lists, CLASSES, len(CLASSES), converted)


def _pairs(root: Path, kind: str, split: str) -> dict[str, tuple[Path, Path]]:
    """(image, label file) by name, none where the split is not there; train_extra needs an archive of its own."""
    images = root / "leftImg8bit" / split
    if not (root / kind / split).is_dir() or (split == "train_extra" and not images.is_dir()):
        return {}
    pictures = by_name(images, "*/*_leftImg8bit.png", "_leftImg8bit.png", REMEDY)
    labels = by_name(root / kind / split, f"*/*_{kind}_labelIds.png", f"_{kind}_labelIds.png", REMEDY)
    return pair(pictures, labels, REMEDY)


def _mask(labels: Path, kind: str, split: str, out: str, jobs: list[Job], ready: list[Path]) -> Path:
    """The mask of train ids that cityscapesscripts made beside a label file, or the one to be made in `out`."""
    made = labels.with_name(labels.name.replace("_labelIds", "_labelTrainIds"))
    if made.is_file():
        ready.append(made)
        return made
    target = Path(out, "mask", kind, split, made.name)
    jobs.append(remapping(labels, target, table_of(train_ids())))
    return target


def _coarse(frame: pd.DataFrame, masks: dict, fine: dict | None, data_root: str) -> pd.DataFrame:
    """A list whose masks are noisy as annotators are, with the fine mask where every image has one."""
    frame = frame.assign(iterations=1, op="coarse")
    if not fine or not masks.keys() <= fine.keys():
        return frame
    return frame.assign(clean=[from_root(fine[name], data_root) for name in masks])
