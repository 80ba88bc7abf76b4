"""Scores every annotation of a list against teacher masks and writes weight lists.

Paper   NLKD, ICASSP 2021: the weight of a sample is the agreement of its annotation with the teacher's mask, as mIoU,
        boundary F1 (bf), or their mean (bm).
Run     python utils/get_weight.py --list data/csv/train_noisy_60.csv --teacher masks/PointRend --out data/csv
Writes  OUT/<list>_<teacher>_weight_<score>score.csv with img, filename, weight and all scores.
"""

import hashlib
import json
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import cv2
import numpy as np
from tqdm import tqdm

from utils.args import launch
from utils.errors import InputError, report_bad_rows, warn
from utils.images import read_mask, resize_mask
from utils.lists import join, read_list, unique_stems, write_list
from utils.logs import read_record, replace_text
from utils.scores import QUALITIES, pair_scores

CHUNK = 16  # rows of one task: handing over a task costs as much as scoring a small mask


@dataclass
class Args:
    list: Annotated[str, "annotated list (img, filename; iterations where the noise is known)"]
    teacher: Annotated[list[str], "folders of <stem>.png masks, or lists img,filename; several are averaged"]
    out: Annotated[str, "folder of the weight lists"]
    name: Annotated[str, "teacher name in the file names; empty: from the first folder"] = ""
    score: Annotated[list[str], "which weights to write: miou bf bm dice iou"] = field(
        default_factory=lambda: ["miou", "bf", "bm"]
    )
    share: Annotated[list[float], "share of every teacher in the weight; empty: equal"] = field(default_factory=list)
    bm_share: Annotated[float, "share of bf in bm; 0.5 is published"] = 0.5
    classes: Annotated[int, "1: binary masks; more: class indices, 255 is ignored"] = 1
    theta0: Annotated[int, "boundary score: width of the boundary operator, odd"] = 3
    theta: Annotated[int, "boundary score: odd; (theta - 1) / 2 pixels of tolerance"] = 5
    size: Annotated[int, "compare the masks at size x size; 0: as they are"] = 0
    data_root: Annotated[str, "folder that relative paths in the lists start from"] = "."
    workers: Annotated[int, "threads; 0: one a core"] = 0


def main(args: Args) -> dict:
    """Write a weight list for every score, or do nothing where the same ones are there.

    Returns {score: quality report or {}} and prints it where the noise is known.
    """
    shares = _check(args)
    record, note = _record(args), Path(args.out) / f".{Path(args.list).stem}_{_teacher_name(args)}_weight.json"
    if record and read_record(note) == record and all(_path(s, args).exists() for s in args.score):
        print(f"{_path(args.score[0], args)}: weights are there already")
        return {}
    frame = read_list(args.list)
    teachers = [_teacher_masks(t, frame, args) for t in args.teacher]
    for teacher in args.teacher:
        _warn_if_biased(teacher)
    values = np.zeros((len(frame), len(QUALITIES)), np.float64)
    bad = []
    for first, rows in _score_all(frame, teachers, args):
        for i, found in enumerate(rows, first):
            if isinstance(found, InputError):
                bad.append((int(frame["line"].iloc[i]), str(found)))
            else:
                values[i] = shares @ found
    report_bad_rows(args.list, bad, "Correct or remove these rows; every image needs a mask of every teacher.")
    for k, name in enumerate(QUALITIES):
        frame[name] = values[:, k].round(8)
    frame["bm"] = (args.bm_share * frame["bf"] + (1 - args.bm_share) * frame["miou"]).round(8)
    reports = {score: _write(frame, score, args) for score in args.score}
    if record:
        replace_text(note, json.dumps(record, indent=1) + "\n")
    return reports


def weight_report(weight: np.ndarray, noisy: np.ndarray) -> dict[str, float]:
    """How well weights (n,) find the clean masks, given which are noisy (n,) bool.

    `auroc` and `ap` of clean (and `ap_noisy` of noisy) as the class to find, `noisy_share` of the total weight,
    `effective_size` = (sum w)^2 / sum w^2; empty where all masks are of one kind.
    """
    if noisy.all() or not noisy.any():
        return {}
    from sklearn.metrics import average_precision_score, roc_auc_score  # a second to import, only needed here

    total = weight.sum()
    return {
        "auroc": float(roc_auc_score(~noisy, weight)),
        "ap": float(average_precision_score(~noisy, weight)),
        "ap_noisy": float(average_precision_score(noisy, -weight)),
        "noisy_share": float(weight[noisy].sum() / total) if total > 0 else float("nan"),
        "effective_size": float(total**2 / (weight**2).sum()) if total > 0 else 0.0,
    }


def score_row(mask_path, teacher_paths, classes: int, theta0: int, theta: int, size: int) -> np.ndarray:
    """(teachers, scores) in the order of QUALITIES for one annotation; InputError for files that do not fit."""
    mask = read_mask(mask_path, classes)
    rows = []
    for path in teacher_paths:
        pred = read_mask(path, classes)
        if pred.shape != mask.shape:
            sizes = f"{mask.shape[1]}x{mask.shape[0]} and {pred.shape[1]}x{pred.shape[0]}"
            raise InputError(f"{mask_path} and {path} have different sizes: {sizes}")
        pair = [resize_mask(m, size) for m in (pred, mask)] if size else (pred, mask)
        scores = pair_scores(*pair, classes, theta0, theta)
        rows.append([scores[name] for name in QUALITIES])
    return np.array(rows, np.float64)


def _score_all(frame, teachers, args):
    """Yield (first row, [scores or InputError of that row and those after it]) until all rows are scored, in order."""
    cv2.setNumThreads(0)  # the threads are ours
    sources = [*teachers, (args.data_root, frame["filename"].tolist())]

    def some(first):
        rows = []
        for i in range(first, min(first + CHUNK, len(frame))):
            *preds, mask = (Path(root, names[i]) for root, names in sources)
            try:
                rows.append(score_row(mask, preds, args.classes, args.theta0, args.theta, args.size))
            except InputError as error:
                rows.append(error)
        return first, rows

    workers = args.workers or len(os.sched_getaffinity(0))
    chunks = range(0, len(frame), CHUNK)
    found = map(some, chunks) if workers == 1 else _in_threads(some, chunks, workers)
    with tqdm(total=len(frame), desc=f"scoring {args.list}", leave=False, disable=None) as bar:
        for first, rows in found:
            bar.update(len(rows))
            yield first, rows


def _in_threads(work, items, workers):
    """As map(work, items), by threads; however long the list, few results wait, and few tasks outlive an interrupt."""
    waiting, pool = deque(), ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check(args) -> np.ndarray:
    unknown = [s for s in args.score if s not in QUALITIES]
    if unknown:
        raise InputError(f"--score {unknown[0]}: known scores are {', '.join(QUALITIES)}")
    usable = len(args.share) == len(args.teacher) and np.isfinite(args.share).all() and min(args.share, default=0) >= 0
    if args.share and not (usable and sum(args.share) > 0):
        raise InputError(f"--share: needs one share of 0 or more for each of the {len(args.teacher)} teachers")
    if args.workers < 0:
        raise InputError(f"--workers {args.workers}: must be 0 or more")
    if not 0 <= args.bm_share <= 1:
        raise InputError(f"--bm-share {args.bm_share}: must lie between 0 and 1")
    for flag in ("theta0", "theta"):
        if getattr(args, flag) < 1 or getattr(args, flag) % 2 == 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be odd and positive")
    shares = np.array(args.share or [1.0] * len(args.teacher))
    return shares / shares.sum()


def _teacher_masks(teacher: str, frame, args) -> tuple[str, list[str]]:
    """The folder that a teacher's masks are in, and the name of each there."""
    if teacher.endswith(".csv"):
        return args.data_root, join(frame[["img"]], read_list(teacher), teacher)["filename"].tolist()
    if not Path(teacher).is_dir():
        raise InputError(f"--teacher {teacher}: no such folder; write the masks with utils/predict_mask.py")
    return teacher, [f"{stem}.png" for stem in unique_stems(frame, args.list)]


def _warn_if_biased(teacher: str) -> None:
    about = Path(teacher.removesuffix(".csv")) / "teacher.json"
    if not read_record(about).get("trusted"):
        warn(
            f"nothing says that {teacher} was trained on a trusted list. A teacher trained on masks with a one-sided "
            "error learns that error and can rank the masks upside down (README, The teacher)."
        )


def _record(args) -> dict:
    """What the weights follow from; empty where a teacher's masks do not say what they are (utils/predict_mask.py)."""
    notes = [Path(teacher.removesuffix(".csv")) / "teacher.json" for teacher in args.teacher]
    if not all(note.exists() for note in notes) or not Path(args.list).is_file():
        return {}
    files = [*notes, Path(args.list)]
    flags = {k: v for k, v in asdict(args).items() if k not in ("workers", "score")}
    flags["written"] = Path(args.list).stat().st_mtime_ns  # noisy masks that are made again write their list again
    return flags | {"score": sorted(args.score), "content": [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]}


def _teacher_name(args) -> str:
    return args.name or Path(args.teacher[0].removesuffix(".csv")).name


def _path(score: str, args) -> Path:
    return Path(args.out) / f"{Path(args.list).stem}_{_teacher_name(args)}_weight_{score}score.csv"


def _write(frame, score: str, args) -> dict:
    path = _path(score, args)
    frame = frame.assign(weight=frame[score].clip(0, 1))
    first = ["img", "filename", "weight"]
    write_list(frame[first + [c for c in frame if c not in (*first, "line")]], path)
    report = (
        weight_report(frame["weight"].to_numpy(), frame["iterations"].to_numpy() > 0) if "iterations" in frame else {}
    )
    shown = "  ".join(f"{k} {v:.4f}" if v < 2 else f"{k} {v:.0f}" for k, v in report.items())
    print(f"{path}: mean weight {frame['weight'].mean():.4f}{'  ' + shown if shown else ''}")
    return report


if __name__ == "__main__":
    launch(main, Args)
