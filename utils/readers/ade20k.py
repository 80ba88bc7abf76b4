"""ADE20K scene parsing, 150 classes, as in ADEChallengeData2016.zip (Zhou et al., CVPR 2017)."""

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
    remapping,
    rows_of,
    table_of,
)

CLASSES = 150
PUBLISHED = {"train": 20210, "valid": 2000}
REMEDY = "unpack ADEChallengeData2016.zip, with images/training, annotations/training and the same for validation"


def prepare(args: SetArgs) -> None:
    """ADE20K (scene parsing): lists train and valid; 1 to 150 become 0 to 149, 0 (other) becomes 255."""
    root = folder_of(args.root, ("annotations", "ADEChallengeData2016/annotations"), REMEDY).parent
    claim(args.out, {"dataset": "ade20k", "root": str(root.absolute())})
    table = table_of({0: IGNORE} | {value: value - 1 for value in range(1, CLASSES + 1)})
    jobs, lists = [], {}
    for name, split in (("train", "training"), ("valid", "validation")):
        images = by_name(root / "images" / split, "*.jpg", ".jpg", REMEDY)
        masks = by_name(root / "annotations" / split, "*.png", ".png", REMEDY)
        pairs = []
        for stem, (image, mask) in pair(images, masks, REMEDY).items():
            target = Path(args.out, "mask", split, f"{stem}.png")
            jobs.append(remapping(mask, target, table))
            pairs.append((image, target))
        lists[name] = rows_of(pairs, args.data_root)
    compare_counts(root, {name: len(frame) for name, frame in lists.items()}, PUBLISHED)
    converted = convert(jobs, args.workers)
    finish(args.out, lists, _names(root / "objectInfo150.txt"), CLASSES, converted)


def _names(path: Path) -> list[str]:
    """The first name of every class in the table that comes with the dataset, none without it."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    return [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
