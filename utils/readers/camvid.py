"""CamVid (Brostow et al. 2009) with 11 classes, 360x480, as distributed with the SegNet tutorial."""

from pathlib import Path

from utils.images import IGNORE
from utils.readers.common import (
    SetArgs,
    by_name,
    claim,
    compare_counts,
    convert,
    finish,
    folder_of,
    pair,
    read_ids,
    remapping,
    rows_of,
    table_of,
)

NAMES = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]
PUBLISHED = {"train": 367, "valid": 101, "test": 233}
VOID = 11
REMEDY = "it must hold train, val and test, each with image and mask, or beside trainannot, valannot and testannot"


def prepare(args: SetArgs) -> None:
    """CamVid, 11 classes: lists train, valid and test; void (11) becomes 255."""
    root = folder_of(args.root, ("train", "camvid/train", "CamVid/train"), REMEDY).parent
    claim(args.out, {"dataset": "camvid", "root": str(root.absolute())})
    table = table_of({k: k for k in range(len(NAMES))} | {VOID: IGNORE})
    jobs, lists = [], {}
    for name, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        pairs = []
        for stem, (image, mask) in _pairs(root, split).items():
            target = Path(args.out, "mask", split, f"{stem}.png")
            jobs.append(remapping(mask, target, table))
            pairs.append((image, target))
        lists[name] = rows_of(pairs, args.data_root)
    compare_counts(root, {name: len(frame) for name, frame in lists.items()}, PUBLISHED)
    converted = convert(jobs, args.workers)
    finish(args.out, lists, NAMES, len(NAMES), converted)


def _pairs(root: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """(image, mask) by stem: of both layouts, in the order of the text list where there is one."""
    nested = (root / split / "image").is_dir()
    folders = (root / split / "image", root / split / "mask") if nested else (root / split, root / f"{split}annot")
    images, masks = ({path.stem: path for path in by_name(folder, "*.*", "", REMEDY).values()} for folder in folders)
    found = pair(images, masks, REMEDY)
    listed = root / f"{split}.txt"
    if not listed.is_file():
        return found
    # a line names the image and the mask, as they lay on the disk of who wrote it
    stems = [Path(line.split()[0]).stem for line in read_ids(listed, REMEDY)]
    lone = next((stem for stem in stems if stem not in found), None)
    if lone:
        # the same words as for a mask that is missing
        pair({lone: folders[0] / f"{lone}.png"}, {}, f"{listed} names it; get the dataset again")
    return {stem: found[stem] for stem in stems}
