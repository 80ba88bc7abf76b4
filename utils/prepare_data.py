"""Makes data and its lists: draws the built-in set, reads published datasets, splits folders or a list, cuts folds.

Run   python utils/prepare_data.py demo --out data/demo
      python utils/prepare_data.py folder --images data/demo/image --masks data/demo/mask --out data/demo/csv
      python utils/prepare_data.py folds data/demo/csv/train.csv --k 3 --out data/demo/csv
      python utils/prepare_data.py split data/demo/csv/train.csv --fraction 1/16 1/8 --out data/demo/csv
      python utils/prepare_data.py image-labels data/demo/csv/test.csv --out data/demo/csv/test_labels.csv
      python utils/prepare_data.py text splits/pascal/92/labeled.txt --root data/VOC --out data/csv/labelled_92.csv
      python utils/prepare_data.py regroup --list all.csv --mapping groups.csv --out data/masks/groups
      python utils/prepare_data.py camvid /data/CamVid --out data/camvid
      python utils/prepare_data.py jsrt --source data/jsrt --organ lung --out data/csv/jsrt_lung

data/README.md describes the readers of published datasets: person, pet, voc, cityscapes, camvid, ade20k, cocostuff,
jsrt.
"""

import json
import math
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from utils import demo
from utils.args import launch_commands
from utils.errors import InputError
from utils.image_labels import with_image_labels
from utils.images import SUFFIXES, read_mask, write_mask
from utils.lists import from_root, read_list, unique_stems
from utils.logs import read_record, replace_text
from utils.readers import ade20k, camvid, cityscapes, cocostuff, jsrt, person, pet, voc
from utils.readers.common import SetArgs
from utils.regroup import RegroupArgs, regroup
from utils.splits import LabelledArgs, TextArgs, convert_text, split_labelled
from utils.written import write_new_lists


@dataclass
class DemoArgs:
    out: Annotated[str, "folder of the set; gets image/ and mask/"]
    images: Annotated[int, "how many pictures"] = 300
    size: Annotated[int, "height and width in pixels"] = 321
    seed: Annotated[int, "picture i of a seed is always the same"] = 0
    workers: Annotated[int, "drawing threads; 0: one a core"] = 0


@dataclass
class SplitArgs:
    out: Annotated[str, "folder that gets pool.csv, train.csv, valid.csv and test.csv"]
    test: Annotated[float, "test images: a share below 1, or a count; 0: no test list"] = 0.2
    valid: Annotated[float, "share of the rest for validation; 0: no validation list"] = 0.1
    seed: Annotated[int, "seed of the split; 2020 is the published one"] = 2020


@dataclass
class _FolderNames:
    images: Annotated[str, "folder of the images"]
    masks: Annotated[str, "folder of the masks, named like the images"]


@dataclass
class FolderArgs(SplitArgs, _FolderNames):
    data_root: Annotated[str, "paths inside this folder are written relative to it"] = "."
    classes: Annotated[int, "1: masks of 0/1 or 0/255; more: class indices, 255 is ignored"] = 1


@dataclass
class _ListName:
    csv: Annotated[str, "list with the columns img and filename", "positional"]


@dataclass
class ListArgs(SplitArgs, _ListName):
    pass


@dataclass
class FoldsArgs:
    csv: Annotated[str, "list with the columns img and filename", "positional"]
    out: Annotated[str, "folder that gets foldI_train.csv and foldI_held_out.csv for every fold I"]
    k: Annotated[int, "number of folds"] = 3
    seed: Annotated[int, "seed of the shuffle"] = 0


@dataclass
class LabelArgs:
    csv: Annotated[str, "list with the columns img and filename", "positional"]
    out: Annotated[str, "the list to write: the same with a column label, the classes of an image, such as `0 5 9`"]
    classes: Annotated[int, "of the masks; 1: masks of 0/1 or 0/255, whose classes are 0 and 1"] = 1
    data_root: Annotated[str, "folder that relative paths in the list start from"] = "."


def split(ids: list[str], test: int, valid: float, seed: int) -> tuple[list[str], list[str], list[str]]:
    """The published split of NLKD: (train, valid, test) ids, the first two shuffled, the test ids sorted as text.

    `test` is a count; ceil(`valid` * rest) of the remaining ids validate, as scikit-learn rounds. On the ids "1" to
    "5711" with 711, 0.1 and seed 2020 these are the published lists, order included.
    """
    held_out, _ = draw_test(ids, test, seed)
    pool = pool_of(ids, held_out)
    order = np.random.RandomState(seed).permutation(len(pool))  # the generator behind scikit-learn's train_test_split
    first = math.ceil(valid * len(pool))
    return [pool[i] for i in order[first:]], [pool[i] for i in order[:first]], held_out


def draw_test(ids: list[str], count: int, seed: int) -> tuple[list[str], random.Random]:
    """The test ids, sorted as text, and the generator as the draw left it: the published noise continues its stream."""
    rng = random.Random(seed)
    return sorted(rng.sample(sorted(ids), count)), rng


def pool_of(ids: list[str], held_out: list[str]) -> list[str]:
    """What is left of `ids` without `held_out`, sorted as text."""
    return sorted(set(ids) - set(held_out))


def folds(count: int, k: int, seed: int) -> list[np.ndarray]:
    """Row numbers of `k` folds of `count` rows, each ascending; sizes differ by one at most."""
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(fold) for fold in np.array_split(order, k)]


def draw_demo(args: DemoArgs) -> None:
    """Draw the built-in set of people in front of textures, with exact masks."""
    if args.images < 1 or args.size < 16 or args.seed < 0 or args.workers < 0:
        raise InputError("demo: --images must be 1 or more, --size 16 or more, --seed and --workers 0 or more")
    out = Path(args.out)
    # Written last, so that a set without it is unfinished.
    note = out / "demo.json"
    wanted = {"images": args.images, "size": args.size, "seed": args.seed, "drawing": demo.DRAWING}
    names = [f"{index:05d}" for index in range(1, args.images + 1)]
    files = {out / "image" / f"{name}.jpg" for name in names} | {out / "mask" / f"{name}.png" for name in names}
    there = {path for folder in ("image", "mask") for path in (out / folder).glob("[!.]*")}
    if read_record(note) not in ({}, wanted):
        raise InputError(f"{note}: the set was drawn with other arguments; choose another --out or delete {out}")
    if there - files:
        raise InputError(f"{min(there - files)}: not a file of this set; choose another --out or delete {out}")
    if read_record(note) and there == files:
        print(f"{out}: all {args.images} pictures are there already; nothing to do")
        return
    _draw_all(args, out, names)
    replace_text(note, json.dumps(wanted))
    print(f"wrote {args.images} pictures of {args.size} pixels to {out / 'image'}, their masks to {out / 'mask'}")


def split_folder(args: FolderArgs) -> None:
    """Split two folders, of images and of masks with equal names, into lists."""
    images, masks = _by_stem(args.images, "--images"), _by_stem(args.masks, "--masks")
    for one, other, what, flag in ((images, masks, "mask", "--masks"), (masks, images, "image", "--images")):
        lone = sorted(one.keys() - other.keys())
        if lone:
            more = f" ({len(lone)} such files)" if len(lone) > 1 else ""
            raise InputError(f"{one[lone[0]]}: no {what} `{lone[0]}` in {flag}{more}; add it or remove this file")
    stems = sorted(images)
    with ThreadPoolExecutor() as pool:
        checks = pool.map(lambda stem: read_mask(masks[stem], args.classes) is None, stems)
        list(tqdm(checks, "masks", len(stems), disable=None, leave=False))
    paths = [(from_root(images[s], args.data_root), from_root(masks[s], args.data_root), 0) for s in stems]
    frame = pd.DataFrame(paths, columns=["img", "filename", "iterations"])
    _write_split(frame, stems, args, args.images)


def split_list(args: ListArgs) -> None:
    """Split one list; its other columns are kept."""
    frame = read_list(args.csv)
    if "iterations" not in frame:
        frame.insert(2, "iterations", 0)
    _write_split(frame, unique_stems(frame, args.csv), args, args.csv)


def cut_folds(args: FoldsArgs) -> None:
    """Cut a list into folds: a teacher trained on foldI_train has not seen foldI_held_out."""
    frame = read_list(args.csv)
    if not 2 <= args.k <= len(frame) or args.seed < 0:
        raise InputError(f"{args.csv}: {len(frame)} rows; --k must be between 2 and that, --seed 0 or more")
    lists = {}
    for number, rows in enumerate(folds(len(frame), args.k, args.seed)):
        lists[f"fold{number}_train.csv"] = frame.drop(index=rows)
        lists[f"fold{number}_held_out.csv"] = frame.loc[rows]
    write_new_lists(lists, Path(args.out))


def label_list(args: LabelArgs) -> None:
    """Write a list with the classes of every image, from its mask, as column label."""
    frame = with_image_labels(read_list(args.csv), args.classes, args.data_root, args.csv)
    write_new_lists({Path(args.out).name: frame.drop(columns="line")}, Path(args.out).parent)


def _draw_all(args: DemoArgs, out: Path, names: list[str]) -> None:
    for folder in ("image", "mask"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    demo.photos()  # before the threads, which would each read them

    def one(index: int) -> None:
        image, mask = demo.draw(args.seed, index, args.size)
        _, jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        (out / "image" / f"{names[index - 1]}.jpg").write_bytes(jpeg.tobytes())
        write_mask(out / "mask" / f"{names[index - 1]}.png", mask)

    with ThreadPoolExecutor(args.workers or os.cpu_count()) as pool:
        list(tqdm(pool.map(one, range(1, args.images + 1)), "drawing", args.images, disable=None))


def _by_stem(folder: str, flag: str) -> dict[str, Path]:
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; correct {flag}")
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise InputError(f"{path}: `{found[path.stem].name}` has the same stem; rename or remove one of them")
        found[path.stem] = path
    if not found:
        raise InputError(f"{folder}: holds no {', '.join(s[1:] for s in SUFFIXES)} file; correct {flag}")
    return found


def _write_split(frame: pd.DataFrame, ids: list[str], args: SplitArgs, source: str) -> None:
    test = _test_count(args, len(ids), source)
    train, valid, held_out = split(ids, test, args.valid, args.seed)
    if not train:
        raise InputError(f"{source}: {len(ids)} images leave none to train on; lower --test or --valid, or add images")
    table = frame.assign(stem=ids).set_index("stem")
    chosen = {"pool": pool_of(ids, held_out), "train": train, "valid": valid, "test": held_out}
    write_new_lists({f"{name}.csv": table.loc[rows] for name, rows in chosen.items()}, Path(args.out))


def _test_count(args: SplitArgs, count: int, source: str) -> int:
    if not 0 <= args.valid < 1:
        raise InputError(f"--valid {args.valid}: must be a share, 0 or more and below 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be 0 or more and below 2^32")
    if not args.test >= 0 or (args.test >= 1 and args.test != round(args.test)):
        raise InputError(f"--test {args.test}: must be a share below 1 or a whole number of images")
    test = int(args.test) if args.test >= 1 else math.ceil(args.test * count)
    if test >= count:
        raise InputError(f"{source}: {count} images, of which --test takes {test}; lower --test or add images")
    return test


COMMANDS: dict[str, tuple[Callable, type]] = {
    "demo": (draw_demo, DemoArgs),
    "folder": (split_folder, FolderArgs),
    "list": (split_list, ListArgs),
    "folds": (cut_folds, FoldsArgs),
    "split": (split_labelled, LabelledArgs),
    "image-labels": (label_list, LabelArgs),
    "text": (convert_text, TextArgs),
    "regroup": (regroup, RegroupArgs),
    "person": (person.prepare, person.PersonArgs),
    "pet": (pet.prepare, pet.PetArgs),
    "voc": (voc.prepare, voc.VocArgs),
    "cityscapes": (cityscapes.prepare, SetArgs),
    "camvid": (camvid.prepare, SetArgs),
    "ade20k": (ade20k.prepare, SetArgs),
    "cocostuff": (cocostuff.prepare, SetArgs),
    "jsrt": (jsrt.prepare, jsrt.JsrtArgs),
}

if __name__ == "__main__":
    launch_commands(COMMANDS)
