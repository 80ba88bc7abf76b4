"""JSRT chest radiographs with the SCR masks, and the noisy masks published with "spatial correction" (ICLR 2023).

Source  Shiraishi et al., AJR 2000 (radiographs); van Ginneken et al., Medical Image Analysis 2006 (masks); Yao et al.,
        "Learning to segment from noisy annotations: a spatial correction approach", ICLR 2023 (split and noise).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd

from utils.errors import InputError
from utils.images import SUFFIXES
from utils.lists import from_root
from utils.written import write_new_lists

ORGANS = ("lung", "heart", "clavicle")
SPLITS = {"train": "train", "valid": "val", "test": "test"}  # our name of a list, that of the published folders


@dataclass
class JsrtArgs:
    source: Annotated[str, "published folder: images_train, lung_gts_train, lung_180_0.8_0.05_0.2, ..."]
    out: Annotated[str, "folder that gets train.csv (noisy), train_clean.csv, valid.csv and test.csv; one an organ"]
    organ: Annotated[Literal[ORGANS], "whose masks"] = "lung"
    noise: Annotated[str, "folder of noisy masks in --source; empty: the only one of the organ"] = ""
    data_root: Annotated[str, "paths inside this folder are written relative to it"] = "."


def prepare(args: JsrtArgs) -> None:
    """JSRT radiographs with the published noisy masks: lists train, train_clean, valid and test of one organ."""
    lists = jsrt_lists(args.source, args.organ, args.noise)
    for frame in lists.values():
        for column in [name for name in ("img", "filename", "clean") if name in frame]:
            frame[column] = [from_root(path, args.data_root) for path in frame[column]]
    write_new_lists({f"{name}.csv": frame for name, frame in lists.items()}, Path(args.out))


def jsrt_lists(source, organ: str, noise: str = "") -> dict[str, pd.DataFrame]:
    """Four lists of one organ: `train` with the noisy masks (the clean ones in column `clean`), `train_clean`, `valid`
    and `test` with clean ones, each with `img`, `filename` and `iterations` (1: noisy) and whole paths.

    `source` is the published folder (images_train, ORGAN_gts_train, ...), `noise` its folder of noisy masks; without
    one it is the only one of the organ. InputError where a folder or a file is missing, and for an image in two splits.
    """
    root = Path(source)
    if not root.is_dir():
        raise InputError(f"{source}: no such folder; --source holds images_train, {organ}_gts_train, ...")
    lists, seen = {}, {}
    for name, split in SPLITS.items():
        images = _files(root / f"images_{split}")
        masks = _masks(root / f"{organ}_gts_{split}", images)
        for stem, path in images.items():
            if stem in seen:
                raise InputError(f"{path}: also {seen[stem]}; an image belongs to one of train, val and test")
        seen |= images
        lists["train_clean" if name == "train" else name] = _frame(images, masks, 0)
        if name == "train":
            noisy = _masks(_noisy_folder(root, organ, noise), images)
            lists = {"train": _frame(images, noisy, 1).assign(clean=list(map(str, masks)))} | lists
    return lists


def _frame(images, masks, iterations) -> pd.DataFrame:
    paths = {"img": map(str, images.values()), "filename": map(str, masks)}
    return pd.DataFrame({column: list(values) for column, values in paths.items()}).assign(iterations=iterations)


def _noisy_folder(root, organ, noise) -> Path:
    if noise:
        return root / noise
    found = sorted(p for p in root.glob(f"{organ}_[0-9]*") if p.is_dir())
    if len(found) != 1:
        what = f"{len(found)} folders {organ}_<T>_<theta1>_<theta2>_<theta3> of noisy masks"
        raise InputError(f"{root}: {what}; {'name one with --noise' if found else 'get the set again'}")
    return found[0]


def _files(folder) -> dict[str, Path]:
    """{stem: path} of the pictures in a folder, by stem."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; correct --source, or get the set again")
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    if not found:
        raise InputError(f"{folder}: holds no picture; get the set again")
    return found


def _masks(folder, images) -> list[Path]:
    """The masks of the images, in their order; every image has one, and every mask an image."""
    masks = _files(folder)
    for one, other, what in ((images, masks, f"no mask in {folder}"), (masks, images, "no image of this name")):
        lone = sorted(one.keys() - other.keys())
        if lone:
            more = f" ({len(lone)} such files)" if len(lone) > 1 else ""
            raise InputError(f"{one[lone[0]]}: {what}{more}; get the set again")
    return [masks[stem] for stem in images]
