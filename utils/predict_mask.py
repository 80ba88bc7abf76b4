"""Writes a teacher's masks for a list: from one checkpoint, an average of several, or leak-free from folds.

Run   python utils/predict_mask.py --list TRAIN.csv --checkpoint runs/teacher/last.pt --out masks/teacher --trusted
      python utils/predict_mask.py --list TRAIN.csv --folds 3 --checkpoint runs/fold0/last.pt runs/fold1/last.pt ...
      with --support also OUT/support and OUT_support.csv, TRAIN.csv with a column for train_*.py --level pixel
      python utils/predict_mask.py --list WEAK.csv --image-labels --checkpoint runs/lpl/best.pt --scales 0.75 1 1.25 \
          --flip --true-masks STRONG.csv --out masks/pseudo
      writes masks of the classes in WEAK.csv's column label, and with STRONG.csv before them OUT_with_true.csv
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pandas as pd

from utils.args import launch
from utils.dense_crf import check_crf, refine
from utils.errors import InputError, report_bad_rows
from utils.images import IGNORE, check_sizes, read_image, read_mask, write_mask, write_picture
from utils.inference import enlarge, to_mask
from utils.lists import from_root, image_labels, read_list, unique_stems, write_list
from utils.logs import read_record, replace_text
from utils.plans import check_scales
from utils.sources import digest
from utils.store import in_threads, key_of, stamp_files
from utils.teachers import load_teachers, probabilities

AHEAD = 8  # images that wait for their masks to be written: each may be large


@dataclass
class Args:
    list: Annotated[str, "images to predict (CSV with a column img)"]
    checkpoint: Annotated[list[str], "one or more checkpoints; the probabilities of several are averaged"]
    out: Annotated[str, "folder of the masks; a list OUT.csv and OUT/teacher.json are written with them"]
    folds: Annotated[int, "K: of the K checkpoints each image is predicted by those that never saw it"] = 0
    trusted: Annotated[
        bool | str,
        "say that the teacher was trained on masks you trust, else get_weight.py warns; with a LIST: check that it was "
        "trained on images of this list alone, and on none of --list",
    ] = False
    support: Annotated[bool, "also write how likely the list's masks are, pixel by pixel, for --level pixel"] = False
    image_labels: Annotated[bool, "predict only classes of an image's column label"] = False
    scales: Annotated[list[float], "sizes to average over, as factors"] = field(default_factory=lambda: [1.0])
    flip: Annotated[bool, "average with the mirrored image"] = False
    crf: Annotated[bool, "let masks follow the edges of the image, by a dense CRF (requirements-crf.txt)"] = False
    true_masks: Annotated[str, "list whose masks stand before the predicted ones in OUT_with_true.csv"] = ""
    net: Annotated[int, "network of a checkpoint of two, 0 or 1; -1: the one that validation chose"] = -1
    data_root: Annotated[str, "folder that relative paths in the list start from"] = "."
    size: Annotated[int, "network input; -1: the size the checkpoint was trained with; 0: as the images are"] = -1
    batch_size: Annotated[int, "images a step"] = 16
    workers: Annotated[int, "loader processes"] = 0
    precision: Annotated[Literal["fp32", "bf16"], "bf16 is faster wherever the hardware has it"] = "fp32"
    cpu: Annotated[bool, "ignore any GPU"] = False


def main(args: Args) -> None:
    """Predict, or do nothing where the same masks are there already."""
    check_scales(args.scales)
    need = ("img",) + ("filename",) * args.support + ("label",) * args.image_labels
    frame, lists = read_list(args.list, need), {}
    stems, out = unique_stems(frame, args.list), Path(args.out)
    paths = [out / f"{stem}.png" for stem in stems]
    supports = [out / "support" / f"{stem}.png" for stem in stems] if args.support else []
    lists[f"{out}.csv"] = pd.DataFrame({"img": frame["img"], "filename": _in_root(paths, args)})
    if args.support:
        lists[f"{out}_support.csv"] = frame.drop(columns="line").assign(support=_in_root(supports, args))
    if args.true_masks:
        lists[f"{out}_with_true.csv"] = with_true(frame, lists[f"{out}.csv"], args)
    record, about = _record(frame, args), out / "teacher.json"
    joined = [Path(f"{out}_with_true.csv")] if args.true_masks else []
    if read_record(about) == record and all(p.exists() for p in paths + supports + joined):
        print(f"{out}: {len(paths)} masks are there already")
        return
    if args.crf:
        check_crf()
    teachers = load_teachers(frame, args.checkpoint, args)
    present = image_labels(frame, max(2, teachers.model["classes"]), args.list) if args.image_labels else None
    _claim(out, about, paths, args.list)
    _predict(frame, teachers, present, paths, supports, args)
    for path, one in lists.items():
        write_list(one, path)
    replace_text(about, json.dumps(record, indent=1) + "\n")
    count = len(args.checkpoint)
    print(f"{out}: {len(paths)} masks from {count} checkpoint{'s' * (count > 1)}; their list is {out}.csv")


def _predict(frame, teachers, present, paths, supports, args) -> None:
    """Write the masks, and what they support; InputError at the end for masks of the list that are bad."""
    if supports:
        supports[0].parent.mkdir(exist_ok=True)
    classes = teachers.model["classes"]

    def write(found):
        i, probability, shape = found
        if args.crf:
            image = read_image(Path(args.data_root, frame["img"].iloc[i]))
            probability = refine(enlarge(probability, shape), image)
        write_mask(paths[i], to_mask(probability, shape), classes)
        return _write_support(supports[i], frame.iloc[i], probability, shape, classes, args) if supports else None

    found = probabilities(frame, teachers, args, present, args.scales, args.flip)
    bad = [one for one in in_threads(write, found, wait=AHEAD) if one]
    report_bad_rows(args.list, bad, "Correct or remove these rows.")


def _write_support(path, row, probability, shape, classes, args) -> tuple[int, str] | None:
    """Write how likely the mask of a row is; its line and what is wrong with it, if something is."""
    try:
        mask = read_mask(Path(args.data_root, row["filename"]), classes)
        check_sizes(row["img"], shape, row["filename"], mask.shape)
    except InputError as error:
        return int(row["line"]), str(error)
    write_picture(path, support_of(enlarge(probability, shape), mask))
    return None


def support_of(probability: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """p(given label) x 255 of every pixel, (H, W) uint8, from (C, H, W) probabilities and a mask (H, W); 255 of void.

    C = 1: `probability` is that of label 1.
    """
    if len(probability) == 1:
        given = np.where(mask == 1, probability[0], 1 - probability[0])
    else:
        void = mask == IGNORE
        given = np.take_along_axis(probability, np.where(void, 0, mask)[None].astype(np.int64), 0)[0]
        given = np.where(void, 1, given)
    return (given * 255).round().clip(0, 255).astype(np.uint8)


def with_true(frame, predicted: pd.DataFrame, args) -> pd.DataFrame:
    """The rows of --true-masks, then the predicted masks of the list; `pseudo` is 0, then 1.

    InputError for images that are in both.
    """
    true = read_list(args.true_masks)
    seen = set(map(os.path.normpath, true["img"]))
    bad = [(row.line, f"{row.img} has a mask there") for row in frame.itertuples() if os.path.normpath(row.img) in seen]
    report_bad_rows(args.list, bad, f"Take these images out of one list, this or {args.true_masks}.")
    return pd.concat([true[["img", "filename"]].assign(pseudo=0), predicted.assign(pseudo=1)], ignore_index=True)


def _record(frame, args) -> dict:
    """What the masks depend on; flags that were not given leave nothing, so that older masks stay known."""
    record = {"checkpoints": [f"{p} {digest(p)}" for p in args.checkpoint]}
    record |= {k: v for k, v in asdict(args).items() if k in ("folds", "trusted", "size", "precision")}
    if isinstance(args.trusted, str):
        record["trusted"] = f"{args.trusted} {_names(read_list(args.trusted, ('img',)))}"
    record["images"] = _names(frame)
    if args.support:  # it is about the masks of the list too
        record["support"] = key_of("support", _stamps(frame, args))
    record |= {"labels": _names(frame, "label")} if args.image_labels else {}
    record |= {"scales": args.scales} if args.scales != [1.0] else {}
    record |= {name: True for name in ("flip", "crf") if getattr(args, name)}
    record |= {"net": args.net} if args.net >= 0 else {}
    return record | ({"true_masks": f"{args.true_masks} {digest(args.true_masks)}"} if args.true_masks else {})


def _names(frame, column="img") -> str:
    return hashlib.sha256("\n".join(frame[column]).encode()).hexdigest()[:16]


def _stamps(frame, args) -> list:
    found = stamp_files([str(Path(args.data_root, name)) for name in frame["filename"]])
    bad = [(line, str(one)) for line, one in zip(frame["line"], found, strict=True) if isinstance(one, InputError)]
    report_bad_rows(args.list, bad, "Correct --data-root, the list or the files.")
    return found


def _in_root(paths, args) -> list[str]:
    return [from_root(path, args.data_root) for path in paths]


def _claim(out: Path, about: Path, paths: list[Path], source: str) -> None:
    """Make the folder ours before anything in it is overwritten; InputError if it holds files of somebody else."""
    listed = Path(f"{out}.csv")
    if not about.exists():
        foreign = next((p for p in paths if p.exists()), listed if listed.exists() else None)
        if foreign:
            raise InputError(f"{foreign}: exists and was not written by this tool; choose another --out")
    if listed.exists() and listed.samefile(source):
        raise InputError(f"{listed}: the list of the masks would overwrite --list; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    replace_text(about, json.dumps({"complete": False}) + "\n")


if __name__ == "__main__":
    launch(main, Args)
